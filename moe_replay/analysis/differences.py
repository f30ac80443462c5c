"""What a comparison of two routing archives says; `comparison` computes it.

Names of measures are those of `docs/methods.md`. Legend: L MoE layers, K experts per token, B bins of positions.
"""

from pydantic import BaseModel, ConfigDict

WORST = 10
"""Sequences listed as the worst."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class LayerDifference(_Record):
    """One MoE layer, over the rows that both archives captured."""

    layer: int
    """Decoder layer index."""
    agreement: float | None
    """Mean of |I_a ∩ I_b| / K; None where no row was captured by both."""
    router_fraction: float | None
    """Share of tokens whose sets differ."""
    parted_sequences: int
    """Sequences with at least one such token."""
    first_position: float | None
    """Median, over these, of the first such token's position in its sequence."""


class SequenceDifference(_Record):
    """One sequence that both archives hold."""

    sequence_a: int
    sequence_b: int
    """Its place in either archive."""
    tokens: int
    agreement: float
    first_position: int | None
    """Of the first token with differing sets; None where there is none."""
    first_layer: int | None
    """The lowest decoder layer in which that token's sets differ."""


class Parting(_Record):
    """Where the routes of sequences part: the first token with differing sets in any layer."""

    sequences: int
    """That part somewhere."""
    positions: tuple[float, float, float, float, float] | None
    """Quantiles 0, 1/4, 1/2, 3/4, 1 of that token's position in its sequence."""
    in_prompt: int | None
    in_response: int | None
    """Sequences by the part that token is of; None where the lengths of the prompts are not known."""


class PositionBins(_Record):
    """Agreement by layer and position, for the heat map."""

    tokens_per_bin: int
    agreement: list[list[float | None]]
    """[L][B]; bin b is of positions b * tokens_per_bin and up. None where no row was captured by both."""


class Comparison(_Record):
    """How the routes of archive a differ from those of archive b."""

    a: str
    b: str
    """run@iteration of each."""
    experts: int
    top_k: int
    same_tokens: bool
    """Both hold the same sequences, in whatever order."""
    shared_sequences: int
    only_a_sequences: int
    only_b_sequences: int
    shared_tokens: int
    compared_rows: int
    """Shared tokens whose routes both captured; all that follows is over these."""
    missing_a_rows: int
    missing_b_rows: int
    missing_both_rows: int
    """Shared tokens without routes, in one archive alone or in both."""
    agreement: float | None
    router_fraction: float | None
    """Share of (token, layer) whose sets differ."""
    token_fraction: float | None
    """Share of tokens with at least one such layer."""
    prompt_agreement: float | None
    response_agreement: float | None
    """Agreement by part of the sequence; None where the lengths of the prompts are not known."""
    parting: Parting
    layers: list[LayerDifference]
    worst: list[SequenceDifference]
    """The `WORST` sequences of lowest agreement, lowest first."""
    bins: PositionBins
