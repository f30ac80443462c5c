"""What routes, router evolution and predictors of an iteration take: bytes, objects, memory and time.

Byte counts, chunks and objects follow from the formats and are exact; stored sizes and times scale from measurements
(`measured`). Legend: N sequences, T tokens of each, L MoE layers, E experts, K experts per token, H hidden size, κ
mini-steps.
"""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moe_replay.analysis.measured import (
    ARCHIVE_MB_S,
    EVOLUTION,
    SourceCodec,
    bound_bytes,
    bytes_per_row,
    nearest_figures,
    ridge_seconds,
)
from moe_replay.archive.route_writing import CHUNK_TOKENS, INDEX_ROWS
from moe_replay.errors import ConfigError
from moe_replay.routing.declared import DeclaredRouters
from moe_replay.routing.trace import route_dtype
from moe_replay.settings import Config

_MB = 1e6
_CARRIED_TOKEN_BYTES = 14
"""In Parquet, of a token's id, log-prob, weight version and text, where nothing in them repeats: 13.4 of ids drawn from
150,000 and four random letters of text each (`tests/analysis/test_sizing.py`)."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Workload(Config):
    """One iteration, as far as it matters here."""

    sequences: int = Field(default=512, ge=1)
    """N, prompts * responses."""
    carried_sequences: int = Field(default=0, ge=0)
    """Responses that partial rollouts have at work besides, and leave to the next, oversampled_prompts * responses."""
    mini_steps: int = Field(default=4, ge=1)
    """κ."""
    codec: Literal["expert-set", "zstd", "raw"] = "expert-set"
    """`raw` is none: what compression is to be compared with, and nothing that an archive can be written in."""
    keep_order: bool = False
    chunk_tokens: int = Field(default=CHUNK_TOKENS, ge=1)
    network_mb_s: float = Field(default=1000, gt=0)
    """To the object store, 10^6 bytes a second."""
    evolution_tokens: int | None = Field(default=4096, ge=1)
    """None: not recorded."""
    evolution_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def stored_as(self) -> SourceCodec:
        """The codec, and whether it keeps order, which only the expert-set codec takes space for."""
        return "expert-set, order kept" if self.codec == "expert-set" and self.keep_order else self.codec


class RouteSizing(_Record):
    """The routes of an iteration whose sequences all have T tokens."""

    tokens_per_sequence: int
    tokens: int
    """N T, the last of each sequence, which has no route, included."""
    raw_bytes: int
    """Exact: `ids` [L, N T, K] of one or two bytes."""
    bound_bytes: float
    """Exact: log2 C(E, K) bits a row, the least for routes of which all are alike likely."""
    stored_bytes: float
    """From a measurement, on uniform routes."""
    captured_bytes: float
    """From a measurement: the same routes in the engine's order, in zstd, that the rollout keeps besides."""
    carried_bytes: float
    """From a measurement: the carried responses, at most, which they take where all have T tokens; 0 where none are."""
    chunks: int
    """Exact: chunks of `ids`, each an object."""
    objects: int
    """Exact: all of the zarr group."""
    chunk_bytes: float
    """From a measurement: one stored chunk of `ids`, the least that is read."""
    engine_bytes_per_sequence: int
    """Exact: what vLLM hands out for a sequence, dense layers included."""
    trace_bytes_per_sequence: int
    """Exact: the same without them, and validity; the rollout process holds it for every sequence."""
    rollout_peak_bytes: int
    """From a measurement: host memory of the rollout process for the routes of the whole batch, at most. Partial
    rollouts have those of what they leave to the next besides, and all twice while responses go on: what they had, and
    what vLLM captures anew of the whole."""
    trainer_bytes_per_sequence: int
    """Exact: the int32 ids in the trainer's batch."""
    device_bytes_per_sequence: int
    """Exact: the int64 ids while the sequence is in a micro-batch, and their presence; its padding comes on top."""
    encode_core_seconds: float
    """From a measurement, as the times that follow."""
    decode_core_seconds: float
    write_seconds: float | None
    """The whole archive, on a disk, with two cores; None for what was not measured."""
    read_seconds: float | None
    upload_seconds: float
    """Of `stored_bytes`, at the network's rate."""


class EvolutionSizing(_Record):
    """Router evolution of an iteration, and the predictor that is fitted from it."""

    tokens: int
    """Exact: those sampled, a whole number for each of mini-steps 2 to κ."""
    raw_bytes: int
    """Exact: hidden states, logits before and after, and where they belong."""
    objects: int
    """Exact: all of the zarr group."""
    mini_step_bytes: int
    """Exact: what is held of one mini-step, float32 hidden states and logits."""
    stored_bytes: float
    """From a measurement, as the times that follow."""
    write_seconds: float
    read_seconds: float
    upload_seconds: float
    predictor_bytes: int
    """Exact: float32 W_p of all layers, in each of two files."""
    fit_seconds: float
    """From a measurement: the ridge fit of all layers, one after the other, on one thread; without judging it."""


class Sizing(_Record):
    """What an iteration takes, by length of its sequences."""

    model_type: str
    layers: tuple[int, ...]
    decoder_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    biased: bool
    """Whether evolution can only be recorded while selection biases are zero (`docs/models.md`)."""
    workload: Workload
    measured_at: tuple[int, int] | None
    """(E, K) of the routes that sizes and times of the codec scale from; None for `raw`."""
    kv_token_bytes: int
    """Exact: what vLLM's scheduler keeps of routes for each token that its KV cache has room for."""
    routes: tuple[RouteSizing, ...]
    evolution: EvolutionSizing | None
    """With sequences of the shortest length, which matters only where they have too few tokens to sample from; None
    where it is not recorded."""


def size_iteration(routers: DeclaredRouters, workload: Workload, tokens: tuple[int, ...]) -> Sizing:
    """What an iteration of `workload` takes, for each length of its sequences.

    Raises ConfigError for lengths below 2 and a batch that does not divide by its mini-steps.
    """
    if not tokens or min(tokens) < 2:
        raise ConfigError(
            f"sequences have 2 tokens at least, one of the prompt and one of the response; given: {tokens}"
        )
    if workload.sequences % workload.mini_steps:
        raise ConfigError(
            f"{workload.mini_steps} mini-steps do not divide {workload.sequences} sequences; change one of the two"
        )
    codec, recorded = workload.stored_as, workload.evolution_tokens is not None and workload.mini_steps > 1
    figures = None if codec == "raw" else nearest_figures(codec, routers.num_experts, routers.top_k)
    return Sizing(
        **routers._asdict(),
        workload=workload,
        measured_at=figures and (figures.num_experts, figures.top_k),
        kv_token_bytes=routers.decoder_layers * _row_bytes(routers),
        routes=tuple(_routes(routers, workload, count) for count in tokens),
        evolution=_evolution(routers, workload, min(tokens)) if recorded else None,
    )


def _row_bytes(routers: DeclaredRouters) -> int:
    return routers.top_k * np.dtype(route_dtype(routers.num_experts)).itemsize


def _routes(routers: DeclaredRouters, workload: Workload, length: int) -> RouteSizing:
    num_layers, shape = len(routers.layers), (routers.num_experts, routers.top_k)
    tokens, row, ids = workload.sequences * length, _row_bytes(routers), length * num_layers * routers.top_k
    rows, codec = num_layers * tokens, workload.stored_as
    stored, raw = rows * bytes_per_row(codec, *shape), rows * row
    chunk = min(workload.chunk_tokens, tokens)
    by_token = -(-tokens // chunk)
    indices = -(-(workload.sequences + 1) // INDEX_ROWS) - (-workload.sequences // INDEX_ROWS)
    figures = None if codec == "raw" else nearest_figures(codec, *shape)
    write, read = ARCHIVE_MB_S.get(codec, (None, None))
    captured, carried = bytes_per_row("zstd", *shape), workload.carried_sequences
    held = 2 * (workload.sequences + carried) if carried else workload.sequences
    engine = (length - 1) * routers.decoder_layers * row
    trace = length * num_layers * row + length
    return RouteSizing(
        tokens_per_sequence=length,
        tokens=tokens,
        raw_bytes=raw,
        bound_bytes=rows * bound_bytes(*shape),
        stored_bytes=stored,
        captured_bytes=rows * captured,
        carried_bytes=carried * length * (num_layers * captured + _CARRIED_TOKEN_BYTES),
        chunks=num_layers * by_token,
        objects=(num_layers + 1) * by_token + indices + 5,  # a zarr.json of each array, and the group's
        chunk_bytes=chunk * stored / rows,
        engine_bytes_per_sequence=engine,
        trace_bytes_per_sequence=trace,
        # What vLLM returned goes as it is read, sequence by sequence.
        rollout_peak_bytes=held * max(engine, trace),
        trainer_bytes_per_sequence=4 * ids,
        device_bytes_per_sequence=8 * ids + length,
        encode_core_seconds=raw / _MB / figures.encode_mb_s if figures else 0,
        decode_core_seconds=raw / _MB / figures.decode_mb_s if figures else 0,
        write_seconds=write and raw / _MB / write,
        read_seconds=read and raw / _MB / read,
        upload_seconds=stored / _MB / workload.network_mb_s,
    )


def _evolution(routers: DeclaredRouters, workload: Workload, length: int) -> EvolutionSizing:
    steps, figures = workload.mini_steps - 1, EVOLUTION[workload.evolution_dtype]
    num_layers, width = len(routers.layers), routers.hidden_size * (2 if workload.evolution_dtype == "bfloat16" else 4)
    # The last token of a sequence is never sampled: it was not fed at rollout.
    fed = workload.sequences // workload.mini_steps * (length - 1)
    rows = min(max(1, (workload.evolution_tokens or 0) // steps), fed)
    tokens = rows * steps
    raw = tokens * (num_layers * (width + 8 * routers.num_experts) + 18)
    predictor = num_layers * routers.num_experts * routers.hidden_size * 4
    return EvolutionSizing(
        tokens=tokens,
        raw_bytes=raw,
        objects=3 * num_layers * steps + 3 * steps + 7,  # a zarr.json of each array, and the group's
        mini_step_bytes=rows * num_layers * (routers.hidden_size + routers.num_experts) * 4,
        stored_bytes=raw * figures.stored_share,
        write_seconds=raw / _MB / figures.write_mb_s,
        read_seconds=raw / _MB / figures.read_mb_s,
        upload_seconds=raw * figures.stored_share / _MB / workload.network_mb_s,
        predictor_bytes=predictor,
        fit_seconds=num_layers * ridge_seconds(routers.hidden_size, routers.num_experts, tokens),
    )
