"""Writing a routing archive in bounded memory; what the format holds is told in `routes`."""

import hashlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import BaseModel, ConfigDict, Field
from zarr.codecs import Crc32cCodec, ZstdCodec

from moe_replay.archive.writing import StageWriter
from moe_replay.archive.zarr_stores import HashingStore
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RouteIds, RoutingTrace, route_dtype

GROUP = "routes"
FORMAT = "moe-replay-routes"
FORMAT_VERSION = 1
CHUNK_TOKENS = 65536
"""Tokens per chunk; at top-8 of 128 experts half a MiB before compression, a good size for one object."""
DIGEST_BYTES = 16

_INDEX_ROWS = 65536


class RouteOrigin(BaseModel):
    """Where routes come from: the engine, the weights they were routed under, the model's shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Who chose the experts, e.g. `vllm`, or `old_log_prob` for the trainer's own pass."""
    engine_version: str
    dtype: str
    """What the engine computed in, e.g. `bfloat16`."""
    weights_sha256: str
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    num_experts: int = Field(ge=1, le=65536)
    top_k: int = Field(ge=1)


class RouteProvenance(RouteOrigin):
    """Where the routes of one archive come from, and of how many tokens they are."""

    run_id: str
    iteration: int = Field(ge=0)
    captured_rows: int = Field(ge=0)
    missing_rows: int = Field(ge=0)


def token_digest(token_ids: npt.ArrayLike) -> bytes:
    """16 bytes that identify one sequence of token ids: BLAKE2b of them as little-endian int32."""
    ids = np.asarray(token_ids)
    if ids.size and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise RoutingMismatch(f"token ids span {ids.min()} to {ids.max()}, beyond 32 bits; these are no token ids")
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=DIGEST_BYTES).digest()


def write_routes(
    writer: StageWriter,
    sequences: Iterable[tuple[RoutingTrace, bytes]],
    origin: RouteOrigin,
    chunk_tokens: int = CHUNK_TOKENS,
) -> RouteProvenance:
    """Write (trace, token digest) of each sequence, holding about `chunk_tokens` tokens in memory at a time.

    Raises RoutingMismatch for a sequence whose layers, experts or top-k are not the origin's.
    """
    store = writer.zarr_store(GROUP)
    group = zarr.create_group(store, zarr_format=3)
    groups = _RowGroups(store, origin, chunk_tokens)
    offsets, digests = [0], []
    for i, (trace, digest) in enumerate(sequences):
        trace.require_model(origin.num_experts, origin.top_k, origin.layers, f"the trace of sequence {i}")
        if len(digest) != DIGEST_BYTES:
            raise RoutingMismatch(f"the token digest of sequence {i} has {len(digest)} bytes; use token_digest")
        offsets.append(offsets[-1] + trace.num_tokens)
        digests.append(digest)
        groups.add(trace)
    groups.finish()
    _write_index(store, "offsets", np.asarray(offsets, dtype=np.int64))
    digests_ND = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    _write_index(store, "token_digests", digests_ND)
    provenance = RouteProvenance(
        **origin.model_dump(),
        run_id=writer.key.run_id,
        iteration=writer.key.iteration,
        captured_rows=groups.num_captured,
        missing_rows=offsets[-1] - groups.num_captured,
    )
    group.update_attributes(
        {"format": FORMAT, "format_version": FORMAT_VERSION, "provenance": provenance.model_dump(mode="json")}
    )
    return provenance


class _RowGroups:
    """Appends traces to `ids` and `valid`, one group of whole chunks at a time."""

    def __init__(self, store: HashingStore, origin: RouteOrigin, chunk_tokens: int) -> None:
        self._store = store
        self._origin = origin
        self._chunk_tokens = chunk_tokens
        self._pending: deque[tuple[RouteIds, npt.NDArray[np.bool_]]] = deque()
        self._num_pending = 0
        self._num_written = 0
        self._arrays: tuple[zarr.Array, zarr.Array] | None = None
        self.num_captured = 0

    def add(self, trace: RoutingTrace) -> None:
        """Take one sequence; writes out what fills whole chunks."""
        self._pending.append((trace.ids_TLK, trace.valid_T))
        self._num_pending += trace.num_tokens
        self.num_captured += int(trace.valid_T.sum())
        while self._num_pending >= self._chunk_tokens:
            self._write(self._chunk_tokens)

    def finish(self) -> None:
        """Write out what is left; also creates the arrays of an empty archive."""
        if self._num_pending or self._arrays is None:
            self._write(self._num_pending)

    def _write(self, num_tokens: int) -> None:
        start, stop = self._num_written, self._num_written + num_tokens
        if self._arrays is None:
            # The first group is the only one of a small archive: its chunks are then no longer than the data.
            self._arrays = self._create(num_tokens)
        else:
            self._arrays[0].resize((len(self._origin.layers), stop, self._origin.top_k))
            self._arrays[1].resize((stop,))
        if num_tokens:
            ids_TLK, valid_T = self._take(num_tokens)
            self._arrays[0][:, start:stop, :] = ids_TLK.transpose(1, 0, 2)
            self._arrays[1][start:stop] = valid_T
        self._num_written = stop

    def _create(self, num_tokens: int) -> tuple[zarr.Array, zarr.Array]:
        num_layers, top_k = len(self._origin.layers), self._origin.top_k
        dtype, chunk = route_dtype(self._origin.num_experts), max(1, num_tokens)
        ids = _create_array(self._store, "ids", (num_layers, num_tokens, top_k), (1, chunk, top_k), dtype)
        return ids, _create_array(self._store, "valid", (num_tokens,), (chunk,), np.bool_)

    def _take(self, num_tokens: int) -> tuple[RouteIds, npt.NDArray[np.bool_]]:
        taken, missing = [], num_tokens
        while missing:
            ids_TLK, valid_T = self._pending.popleft()
            if len(valid_T) > missing:
                self._pending.appendleft((ids_TLK[missing:], valid_T[missing:]))
            taken.append((ids_TLK[:missing], valid_T[:missing]))
            missing -= len(taken[-1][1])
        self._num_pending -= num_tokens
        return np.concatenate([ids for ids, _ in taken]), np.concatenate([valid for _, valid in taken])


def _create_array(
    store: HashingStore, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: npt.DTypeLike
) -> zarr.Array:
    return zarr.create_array(
        store,
        name=name,
        shape=shape,
        chunks=chunks,
        dtype=np.dtype(dtype),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=0,
        zarr_format=3,
        # A chunk left out because it is all zeros could not be told from one that was lost.
        config={"write_empty_chunks": True},
    )


def _write_index(store: HashingStore, name: str, rows: npt.NDArray[Any]) -> None:
    chunks = (min(max(1, len(rows)), _INDEX_ROWS), *rows.shape[1:])
    array = _create_array(store, name, rows.shape, chunks, rows.dtype)
    if len(rows):
        array[:] = rows
