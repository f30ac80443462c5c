"""Two routing archives compared, in bounded memory: the tokens they share, and where the experts of those part.

Sequences are the same when their tokens are; the first with some tokens in one archive is held against the first
with them in the other, the second against the second. Sets are compared, never order. Names of measures are those of
`docs/methods.md`.

Legend: T tokens of one sequence, L MoE layers, K experts per token, N shared sequences, B bins of token positions.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_replay.analysis.differences import (
    WORST,
    Comparison,
    LayerDifference,
    Parting,
    PositionBins,
    SequenceDifference,
)
from moe_replay.archive.routes import RouteArchive
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RouteIds, RoutingTrace

READ_TOKENS = 65536
"""Tokens read of each archive at a time, one sequence at least; as many as a chunk has, which is decoded whole."""
MAX_BINS = 64

_NEVER = -1


class _Pair(NamedTuple):
    """A shared sequence: its place in either archive."""

    a: int
    b: int


def compare_routes(a: RouteArchive, b: RouteArchive, prompt_tokens: Mapping[bytes, int] | None = None) -> Comparison:
    """Compare the routes of the sequences that both archives hold.

    Holds `READ_TOKENS` tokens of each archive and a few numbers per sequence. Fastest where both have their
    sequences in the same order: those are then read together.

    Args:
        a: one archive.
        b: the other, of the same model.
        prompt_tokens: length of the prompt in a sequence by its token digest, where known.

    Raises:
        RoutingMismatch: the archives are of different models or layers.
        ArchiveCorrupt: what is read is not as committed.
    """
    _require_same_model(a, b)
    digests_a = a.token_digests
    pairs = _pairs(digests_a, b.token_digests)
    lengths_a = [part.stop - part.start for part in a.sequence_tokens(0, a.num_sequences)]
    tally = _Tally(a, [lengths_a[pair.a] for pair in pairs])
    for pair, one, other in _read_together(a, b, pairs, lengths_a):
        tally.add(pair, one, other, (prompt_tokens or {}).get(digests_a[pair.a]))
    return _comparison(a, b, pairs, tally)


def name_of(archive: RouteArchive) -> str:
    """run@iteration."""
    return f"{archive.provenance.run_id}@{archive.provenance.iteration}"


def shared_experts(one_TLK: RouteIds, other_TLK: RouteIds) -> npt.NDArray[np.int32]:
    """|I ∩ J| of each token and layer, whatever the order. -> [T, L]; ids of a row are distinct in valid rows."""
    # Column by column: a [T, L, K, K] table of comparisons would take K times the memory of the routes.
    others = [np.ascontiguousarray(other_TLK[..., k]) for k in range(other_TLK.shape[-1])]
    shared_TL = np.zeros(one_TLK.shape[:-1], dtype=np.int32)
    for k in range(one_TLK.shape[-1]):
        column_TL = np.ascontiguousarray(one_TLK[..., k])
        found_TL = np.zeros(column_TL.shape, dtype=np.bool_)
        for other_TL in others:
            found_TL |= column_TL == other_TL
        shared_TL += found_TL
    return shared_TL


def _require_same_model(a: RouteArchive, b: RouteArchive) -> None:
    found = [archive.provenance.origins[0].model for archive in (a, b)]
    if found[0] != found[1]:
        raise RoutingMismatch(
            f"{name_of(a)} has (experts, top_k, layers) = {found[0]}, {name_of(b)} has {found[1]}; routes can be "
            "compared within one model and layer map: give two runs of the same model"
        )


def _pairs(digests_a: Sequence[bytes], digests_b: Sequence[bytes]) -> list[_Pair]:
    waiting: dict[bytes, deque[int]] = defaultdict(deque)
    for place, digest in enumerate(digests_b):
        waiting[digest].append(place)
    return [_Pair(place, waiting[digest].popleft()) for place, digest in enumerate(digests_a) if waiting.get(digest)]


def _read_together(
    a: RouteArchive, b: RouteArchive, pairs: Sequence[_Pair], lengths_a: Sequence[int]
) -> Iterator[tuple[_Pair, RoutingTrace, RoutingTrace]]:
    for run in _neighbours(pairs, lengths_a):
        ones = a.read_sequences(run[0].a, run[-1].a + 1)
        others = b.read_sequences(run[0].b, run[-1].b + 1)
        for pair, one, other in zip(run, ones, others, strict=True):
            if one.num_tokens != other.num_tokens:
                raise RoutingMismatch(
                    f"sequence {pair.a} of {name_of(a)} has {one.num_tokens} tokens, sequence {pair.b} of "
                    f"{name_of(b)} has {other.num_tokens} and the same token digest; one of them was archived with "
                    "digests of other tokens: archive it again"
                )
            yield pair, one, other


def _neighbours(pairs: Sequence[_Pair], lengths_a: Sequence[int]) -> Iterator[list[_Pair]]:
    """The pairs in order, in runs that follow one another in both archives, of `READ_TOKENS` tokens at most."""
    run: list[_Pair] = []
    tokens = 0
    for pair in pairs:
        follows = bool(run) and (pair.a, pair.b) == (run[-1].a + 1, run[-1].b + 1)
        if run and not (follows and tokens + lengths_a[pair.a] <= READ_TOKENS):
            yield run
            run, tokens = [], 0
        run.append(pair)
        tokens += lengths_a[pair.a]
    if run:
        yield run


@dataclass
class _Share:
    """Experts in common of some rows, out of how many."""

    shared: int = 0
    rows: int = 0

    def add(self, shared_TL: npt.NDArray[np.int32], both_T: npt.NDArray[np.bool_]) -> None:
        self.shared += int(shared_TL.sum())
        self.rows += int(both_T.sum())

    def agreement(self, experts_per_row: int) -> float | None:
        return self.shared / (self.rows * experts_per_row) if self.rows else None


class _Tally:
    """Sums over the sequences compared so far; memory is a few numbers per sequence, layer and bin."""

    def __init__(self, model: RouteArchive, lengths: Sequence[int]) -> None:
        num_layers, longest = len(model.layers), max([1, *lengths])
        self.tokens_per_bin = -(-longest // MAX_BINS)
        num_bins = -(-longest // self.tokens_per_bin)
        self.layers, self.top_k = model.layers, model.provenance.top_k
        self.shared_BL = np.zeros((num_bins, num_layers), dtype=np.int64)
        self.rows_B = np.zeros(num_bins, dtype=np.int64)
        self.differing_L = np.zeros(num_layers, dtype=np.int64)
        self.differing_tokens = 0
        self.missing = {"a": 0, "b": 0, "both": 0}
        self.prompt, self.response = _Share(), _Share()
        self.first_NL = np.full((len(lengths), num_layers), _NEVER, dtype=np.int32)
        self.sequences: list[SequenceDifference | None] = []
        self.in_prompt: list[bool | None] = []

    def add(self, pair: _Pair, one: RoutingTrace, other: RoutingTrace, prompt_tokens: int | None) -> None:
        """Take one shared sequence."""
        both_T = one.valid_T & other.valid_T
        shared_TL = shared_experts(one.ids_TLK, other.ids_TLK) * both_T[:, None]
        differs_TL = both_T[:, None] & (shared_TL < self.top_k)
        self._add_missing(one.valid_T, other.valid_T)
        self._add_bins(shared_TL, both_T)
        self.differing_L += differs_TL.sum(0)
        self.differing_tokens += int(differs_TL.any(1).sum())
        first = None
        parted_L = differs_TL.any(0)
        if parted_L.any():
            firsts_L = differs_TL.argmax(0)[parted_L]
            self.first_NL[len(self.sequences), parted_L] = firsts_L
            first = int(firsts_L.min())
        self.in_prompt.append(None if first is None or prompt_tokens is None else first < prompt_tokens)
        if prompt_tokens is not None:
            self.prompt.add(shared_TL[:prompt_tokens], both_T[:prompt_tokens])
            self.response.add(shared_TL[prompt_tokens:], both_T[prompt_tokens:])
        self.sequences.append(self._difference(pair, shared_TL, both_T, first))

    def _add_missing(self, valid_a_T: npt.NDArray[np.bool_], valid_b_T: npt.NDArray[np.bool_]) -> None:
        self.missing["a"] += int((~valid_a_T & valid_b_T).sum())
        self.missing["b"] += int((valid_a_T & ~valid_b_T).sum())
        self.missing["both"] += int((~valid_a_T & ~valid_b_T).sum())

    def _add_bins(self, shared_TL: npt.NDArray[np.int32], both_T: npt.NDArray[np.bool_]) -> None:
        starts = np.arange(0, len(both_T), self.tokens_per_bin)
        if len(starts):
            self.shared_BL[: len(starts)] += np.add.reduceat(shared_TL, starts, axis=0)
            self.rows_B[: len(starts)] += np.add.reduceat(both_T.astype(np.int64), starts)

    def _difference(
        self, pair: _Pair, shared_TL: npt.NDArray[np.int32], both_T: npt.NDArray[np.bool_], first: int | None
    ) -> SequenceDifference | None:
        """None where no row was captured by both."""
        rows = int(both_T.sum())
        if not rows:
            return None
        differs_L = shared_TL[first] < self.top_k if first is not None else np.zeros(0, dtype=np.bool_)
        return SequenceDifference(
            sequence_a=pair.a,
            sequence_b=pair.b,
            tokens=len(both_T),
            agreement=int(shared_TL.sum()) / (rows * len(self.layers) * self.top_k),
            first_position=first,
            first_layer=self.layers[int(differs_L.argmax())] if first is not None else None,
        )


def _comparison(a: RouteArchive, b: RouteArchive, pairs: Sequence[_Pair], tally: _Tally) -> Comparison:
    rows, num_layers = int(tally.rows_B.sum()), len(a.layers)
    per_row = num_layers * a.provenance.top_k
    total = _Share(int(tally.shared_BL.sum()), rows)
    compared = [sequence for sequence in tally.sequences if sequence is not None]
    return Comparison(
        a=name_of(a),
        b=name_of(b),
        experts=a.provenance.num_experts,
        top_k=a.provenance.top_k,
        same_tokens=len(pairs) == a.num_sequences == b.num_sequences,
        shared_sequences=len(pairs),
        only_a_sequences=a.num_sequences - len(pairs),
        only_b_sequences=b.num_sequences - len(pairs),
        shared_tokens=rows + sum(tally.missing.values()),
        compared_rows=rows,
        missing_a_rows=tally.missing["a"],
        missing_b_rows=tally.missing["b"],
        missing_both_rows=tally.missing["both"],
        agreement=total.agreement(per_row),
        router_fraction=int(tally.differing_L.sum()) / (rows * num_layers) if rows else None,
        token_fraction=tally.differing_tokens / rows if rows else None,
        prompt_agreement=tally.prompt.agreement(per_row),
        response_agreement=tally.response.agreement(per_row),
        parting=_parting(tally),
        layers=_layer_differences(tally, rows),
        worst=sorted(compared, key=lambda sequence: (sequence.agreement, sequence.sequence_a))[:WORST],
        bins=_position_bins(tally),
    )


def _parting(tally: _Tally) -> Parting:
    firsts = [sequence.first_position for sequence in tally.sequences if sequence is not None]
    positions = [first for first in firsts if first is not None]
    quantiles = np.quantile(positions, [0, 0.25, 0.5, 0.75, 1]).tolist() if positions else None
    known = tally.prompt.rows + tally.response.rows > 0
    return Parting(
        sequences=len(positions),
        positions=quantiles,
        in_prompt=tally.in_prompt.count(True) if known else None,
        in_response=tally.in_prompt.count(False) if known else None,
    )


def _layer_differences(tally: _Tally, rows: int) -> list[LayerDifference]:
    differences = []
    for i, layer in enumerate(tally.layers):
        firsts = tally.first_NL[:, i][tally.first_NL[:, i] != _NEVER]
        differences.append(
            LayerDifference(
                layer=layer,
                agreement=int(tally.shared_BL[:, i].sum()) / (rows * tally.top_k) if rows else None,
                router_fraction=int(tally.differing_L[i]) / rows if rows else None,
                parted_sequences=len(firsts),
                first_position=float(np.median(firsts)) if len(firsts) else None,
            )
        )
    return differences


def _position_bins(tally: _Tally) -> PositionBins:
    slots_B = tally.rows_B * tally.top_k
    agreement = [
        [int(shared) / int(slots) if slots else None for shared, slots in zip(shared_B, slots_B, strict=True)]
        for shared_B in tally.shared_BL.T
    ]
    return PositionBins(tokens_per_bin=tally.tokens_per_bin, agreement=agreement)
