"""Writing a routing archive in bounded memory; what the format holds is told in `docs/archive-format.md`."""

import hashlib
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from moe_replay.archive.provenance import RouteOrigin, RouteProvenance, RowGroupCounter
from moe_replay.archive.writing import StageWriter
from moe_replay.archive.zarr_groups import GroupFormat, create_array
from moe_replay.archive.zarr_stores import HashingStore
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RouteIds, RoutingTrace, route_dtype

FORMAT = GroupFormat("routing archive", "routes", "routes", "routes", "moe-replay-routes", 1)
CHUNK_TOKENS = 65536
"""Tokens per chunk; at top-8 of 128 experts half a MiB before compression, a good size for one object."""
DIGEST_BYTES = 16
RouteCodec = Literal["expert-set", "zstd"]
"""What compresses the routes; it changes their size and nothing that is read."""

INDEX_ROWS = 65536
"""Rows per chunk of `offsets` and `token_digests`."""


class RoutedSequence(NamedTuple):
    """The routes of one sequence; (trace, token digest) alone will do."""

    trace: RoutingTrace
    token_digest: bytes
    origins: tuple[tuple[int, RouteOrigin], ...] = ()
    """(First token, origin) wherever the origin changes, ascending; before the first it is the archive's."""
    padded_rows: int = 0
    """Rows of padding that the source held beside this sequence and that the trace is without."""


def token_digest(token_ids: npt.ArrayLike) -> bytes:
    """16 bytes that identify one sequence of token ids: BLAKE2b of them as little-endian int32."""
    ids = np.asarray(token_ids)
    if ids.size and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise RoutingMismatch(f"token ids span {ids.min()} to {ids.max()}, beyond 32 bits; these are no token ids")
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=DIGEST_BYTES).digest()


def write_routes(
    writer: StageWriter,
    sequences: Iterable[RoutedSequence | tuple[RoutingTrace, bytes]],
    origin: RouteOrigin,
    chunk_tokens: int = CHUNK_TOKENS,
    codec: RouteCodec = "expert-set",
    keep_order: bool = False,
) -> RouteProvenance:
    """Write sequences in the order given, holding about `chunk_tokens` tokens in memory at a time.

    Args:
        writer: of the stage that the archive is the output of.
        sequences: consumed once, one at a time.
        origin: of all tokens whose sequence names no other.
        chunk_tokens: tokens per chunk, and the most in one row group.
        codec: what compresses the routes.
        keep_order: keep the experts of a row in the engine's order; else they come back by ascending id.

    Raises:
        RoutingMismatch: layers, experts or top-k of a sequence are not the origin's, or it makes no sense.
    """
    store = writer.zarr_store(FORMAT.group)
    group = zarr.create_group(store, zarr_format=3)
    chunks, counter = _Chunks(store, origin, chunk_tokens, codec, keep_order), RowGroupCounter(chunk_tokens)
    offsets, digests = [0], []
    for i, sequence in enumerate(sequences):
        routed = sequence if isinstance(sequence, RoutedSequence) else RoutedSequence(*sequence)
        _check(routed, origin, i)
        _count(counter, routed, origin)
        offsets.append(counter.num_tokens)
        digests.append(routed.token_digest)
        chunks.add(routed.trace)
    chunks.finish()
    _write_index(store, "offsets", np.asarray(offsets, dtype=np.int64))
    digests_ND = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    _write_index(store, "token_digests", digests_ND)
    provenance = RouteProvenance(
        run_id=writer.key.run_id,
        iteration=writer.key.iteration,
        order="engine" if keep_order else "ascending",
        origins=tuple(counter.origins) or (origin,),
        row_groups=counter.close(),
    )
    group.update_attributes(FORMAT.attributes(provenance))
    return provenance


def _check(routed: RoutedSequence, origin: RouteOrigin, i: int) -> None:
    trace = routed.trace
    trace.require_model(*origin.model, f"the trace of sequence {i}")
    if len(routed.token_digest) != DIGEST_BYTES:
        raise RoutingMismatch(
            f"the token digest of sequence {i} has {len(routed.token_digest)} bytes; use token_digest"
        )
    starts = [start for start, _ in routed.origins]
    if starts != sorted(set(starts)) or any(not 0 <= start < trace.num_tokens for start in starts):
        raise RoutingMismatch(
            f"the origins of sequence {i} change at tokens {starts}; expected ascending tokens of 0 to "
            f"{trace.num_tokens - 1}: name each change once"
        )
    for _, other in routed.origins:
        trace.require_model(*other.model, f"sequence {i} under the weights {other.weights_sha256}")
    if routed.padded_rows < 0 or (routed.padded_rows and not trace.num_tokens):
        raise RoutingMismatch(
            f"sequence {i} has {trace.num_tokens} tokens and {routed.padded_rows} rows of padding; padding stands "
            "beside tokens: leave out what is padding alone"
        )


def _count(counter: RowGroupCounter, routed: RoutedSequence, origin: RouteOrigin) -> None:
    parts = [(0, origin), *routed.origins]
    stops = [*(start for start, _ in routed.origins), routed.trace.num_tokens]
    for (start, its_origin), stop in zip(parts, stops, strict=True):
        if start < stop:
            counter.add(routed.trace.valid_T[start:stop], its_origin)
    counter.add_padding(routed.padded_rows)


class _Chunks:
    """Appends traces to `ids` and `valid`, one chunk of tokens at a time."""

    def __init__(
        self, store: HashingStore, origin: RouteOrigin, chunk_tokens: int, codec: RouteCodec, keep_order: bool
    ) -> None:
        self._store = store
        self._origin = origin
        self._chunk_tokens = chunk_tokens
        self._codec: RouteCodec = codec
        self._keep_order = keep_order
        self._pending: deque[tuple[RouteIds, npt.NDArray[np.bool_]]] = deque()
        self._num_pending = 0
        self._num_written = 0
        self._arrays: tuple[zarr.Array, zarr.Array] | None = None

    def add(self, trace: RoutingTrace) -> None:
        """Take one sequence; writes out the chunks it fills."""
        self._pending.append((trace.ids_TLK, trace.valid_T))
        self._num_pending += trace.num_tokens
        while self._num_pending >= self._chunk_tokens:
            self._write(self._chunk_tokens)

    def finish(self) -> None:
        """Write out what is left; also creates the arrays of an empty archive."""
        if self._num_pending or self._arrays is None:
            self._write(self._num_pending)

    def _write(self, num_tokens: int) -> None:
        start, stop = self._num_written, self._num_written + num_tokens
        if self._arrays is None:
            # The first chunk is the only one of a small archive: it is then no longer than the data.
            self._arrays = self._create(num_tokens)
        else:
            self._arrays[0].resize((len(self._origin.layers), stop, self._origin.top_k))
            self._arrays[1].resize((stop,))
        if num_tokens:
            ids_TLK, valid_T = self._take(num_tokens)
            if self._codec == "zstd" and not self._keep_order:
                ids_TLK.sort(axis=-1)  # the expert-set codec does so itself
            self._arrays[0][:, start:stop, :] = ids_TLK.transpose(1, 0, 2)
            self._arrays[1][start:stop] = valid_T
        self._num_written = stop

    def _create(self, num_tokens: int) -> tuple[zarr.Array, zarr.Array]:
        num_layers, top_k = len(self._origin.layers), self._origin.top_k
        dtype, chunk = route_dtype(self._origin.num_experts), max(1, num_tokens)
        ids = create_array(
            self._store, "ids", (num_layers, num_tokens, top_k), (1, chunk, top_k), dtype, **self._pipeline()
        )
        return ids, create_array(self._store, "valid", (num_tokens,), (chunk,), np.bool_)

    def _pipeline(self) -> dict[str, Any]:
        if self._codec == "zstd":
            return {}
        # Its compiled kernels take long to import.
        from moe_replay.archive.codec import ExpertSetCodec

        serializer = ExpertSetCodec(num_experts=self._origin.num_experts, keep_order=self._keep_order)
        return {"serializer": serializer, "compressors": [Crc32cCodec()]}

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


def _write_index(store: HashingStore, name: str, rows: npt.NDArray[Any]) -> None:
    chunks = (min(max(1, len(rows)), INDEX_ROWS), *rows.shape[1:])
    array = create_array(store, name, rows.shape, chunks, rows.dtype)
    if len(rows):
        array[:] = rows
