"""Sets of experts as bytes: rows of K distinct ids below E, each at about log2 of how unlikely it is, not K bytes.

The format is told in docs/expert-set-codec.md. Legend: R rows, P of them present (not missing), K experts per row, E
experts, U items that a row's new experts are chosen from. The compiled loops are imported when first used.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from math import comb, inf, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_replay.archive.byte_streams import WAY_OUT, StreamReader, StreamWriter, compressed_size
from moe_replay.archive.expert_set_model import LOW_STATE, WEIGHTS, RankTables, SetModel, coded_bits, fit_weights
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import RouteIds, route_dtype

PLAIN, RANKS, SETS, RELATED_SETS = range(4)
"""How rows are coded: as they are, for zstd to find what repeats; ranks of equally likely sets; sets, each as likely as
its weights say; the same of what a row has that its reference does not."""

MAX_TABLE = 1 << 20
"""Largest K * (E + 1) for which rows are coded as sets; beyond it the tables would cost more than the rows."""
MAX_SETS = 1 << 63
"""C(E, K) from which on a rank does not fit one word."""
LANES, MIN_ROWS_FOR_LANES = 8, 2048
_HEADER = struct.Struct("<BBIIII")
_KEEPS_ORDER, _WEIGHTED = 1, 2
_SAMPLE_ROWS = 4096
_WORTH_WEIGHING, _WORTH_RELATING = 0.95, 0.9
"""A mode that takes more than twice as long must save 5 % of the bytes, one that takes five times as long 10 %."""
_NETWORK_MAX = 32

Columns = npt.NDArray[np.uint16]
"""[K, P]: all rows' k-th ids side by side."""


@dataclass(frozen=True)
class _Split:
    """What is left to code of each row once it is related to others, or all of it."""

    items_KP: Columns
    counts_P: npt.NDArray[np.uint16]
    """Items in each column of `items_KP`; those below them mean nothing."""
    num_items: int
    """U."""
    masks_BP: npt.NDArray[np.uint8] | None

    def fit(self) -> tuple[SetModel, npt.NDArray[np.uint8] | None, float]:
        """The cheapest model, its weights' bytes (None for equal ones) and the bits it takes."""
        top_k, rows = self.items_KP.shape
        step = -(-rows // _SAMPLE_ROWS) or 1
        used, counts_P = self.items_KP[:, ::step], self.counts_P[::step]
        if self.masks_BP is not None:
            used = used[np.arange(top_k)[:, None] < counts_P]
        times_U = np.bincount(used.ravel(), minlength=self.num_items)
        sizes_n = np.bincount(counts_P, minlength=top_k + 1)
        codes_U = fit_weights(times_U, len(counts_P))
        equal, weighted = SetModel.of_equal_weights(self.num_items, top_k), SetModel.of(WEIGHTS[codes_U], top_k)
        equal_bits = step * (coded_bits(equal, np.zeros_like(codes_U), times_U, sizes_n) + 3 * float(times_U.sum()))
        weighted_bits = step * coded_bits(weighted, codes_U, times_U, sizes_n) + 8 * compressed_size(codes_U)
        return (weighted, codes_U, weighted_bits) if weighted_bits < equal_bits else (equal, None, equal_bits)


def encode_sets(ids_RK: RouteIds, num_experts: int, keep_order: bool = False) -> bytes:
    """The bytes of R rows of K ids; rows of zeros (with K >= 2) are missing and come back as such.

    Raises RoutingMismatch for a row that names an expert twice or one >= `num_experts`.
    """
    num_rows, top_k = ids_RK.shape
    missing_R = _missing_rows(ids_RK)
    present_PK = ids_RK[~missing_R] if missing_R.any() else ids_RK
    sorted_KP = _sorted_columns(present_PK)
    _require_sets(sorted_KP, missing_R, num_experts)
    writer = StreamWriter()
    if missing_R.any():
        writer.add(np.packbits(missing_R, bitorder="little"))
    mode, weighted = _add_rows(writer, sorted_KP, num_experts)
    if keep_order:
        _add_order(writer, present_PK.astype(np.uint16))
    flags = keep_order * _KEEPS_ORDER + weighted * _WEIGHTED
    return _HEADER.pack(mode, flags, num_experts, top_k, num_rows, len(present_PK)) + writer.to_bytes()


def decode_sets(
    data: bytes | memoryview, shape: tuple[int, int], num_experts: int, keep_order: bool = False
) -> RouteIds:
    """The rows that `encode_sets` was given, each sorted ascending unless `keep_order`.

    Raises ArchiveCorrupt for bytes it can't have written, or wrote for another shape, `num_experts` or `keep_order`.
    """
    num_rows, top_k = shape
    dtype = route_dtype(num_experts)
    mode, weighted, num_present = _read_header(data, shape, num_experts, keep_order)
    reader = StreamReader(memoryview(data)[_HEADER.size :])
    missing_R = np.zeros(num_rows, dtype=bool)
    if num_present < num_rows:
        bits = np.unpackbits(reader.take((num_rows + 7) // 8), bitorder="little")
        missing_R = bits[:num_rows].astype(bool)
        if num_rows - int(bits.sum()) != num_present or bits[num_rows:].any():
            raise ArchiveCorrupt(f"{bits.sum()} of {num_rows} rows are missing, but {num_present} present; {WAY_OUT}")
    if mode == PLAIN:
        ids_KP = _take_plain(reader, top_k, num_present, num_experts)
    elif mode == RANKS:
        ids_KP = _take_ranks(reader, top_k, num_present, num_experts)
    else:
        ids_KP = _take_split(reader, mode, weighted, (top_k, num_present), num_experts)
    present_PK = np.ascontiguousarray(ids_KP.T)
    if keep_order:
        _kernels().restore_order(present_PK, _take_order(reader, top_k, num_present))
    reader.finish()
    if num_present == num_rows:
        return present_PK.astype(dtype)
    ids_RK = np.zeros(shape, dtype=dtype)
    ids_RK[~missing_R] = present_PK
    return ids_RK


def _kernels() -> Any:
    # numba takes a second to import, which who only lists runs need not wait for.
    from moe_replay.archive import expert_set_kernels

    return expert_set_kernels


def _read_header(
    data: bytes | memoryview, shape: tuple[int, int], num_experts: int, keep_order: bool
) -> tuple[int, bool, int]:
    if len(data) < _HEADER.size:
        raise ArchiveCorrupt(f"coded rows of {len(data)} bytes lack a header of {_HEADER.size}; {WAY_OUT}")
    mode, flags, experts, top_k, num_rows, num_present = _HEADER.unpack_from(data)
    found = (num_rows, top_k, experts, bool(flags & _KEEPS_ORDER))
    if found != (*shape, num_experts, keep_order):
        raise ArchiveCorrupt(
            f"coded rows are (rows, top_k, experts, order kept) = {found}, expected {(*shape, num_experts, keep_order)}"
            f"; they are another array's, or {WAY_OUT}"
        )
    known_flags = _KEEPS_ORDER | (_WEIGHTED if mode in (SETS, RELATED_SETS) else 0)
    if (
        mode not in _possible_modes(experts, top_k)
        or flags & ~known_flags
        or num_present > num_rows
        or (num_present < num_rows and top_k == 1)
    ):
        raise ArchiveCorrupt(
            f"coded rows have mode {mode}, flags {flags}, {num_present} of {num_rows} rows present; {WAY_OUT}"
        )
    return mode, bool(flags & _WEIGHTED), num_present


def _missing_rows(ids_RK: RouteIds) -> npt.NDArray[np.bool_]:
    num_rows, top_k = ids_RK.shape
    missing_R = np.full(num_rows, top_k > 1)
    for k in range(min(top_k, 2)) if top_k > 1 else ():
        missing_R &= ids_RK[:, k] == 0
    if top_k > 2 and missing_R.any():
        missing_R[missing_R] = ~ids_RK[missing_R].any(axis=1)
    return missing_R


def _sorted_columns(ids_PK: RouteIds) -> Columns:
    """Rows sorted ascending, transposed."""
    top_k = ids_PK.shape[1]
    if top_k > _NETWORK_MAX:
        return np.ascontiguousarray(np.sort(ids_PK, axis=1).T, dtype=np.uint16)
    columns = list(ids_PK.T.astype(np.uint16, order="C"))
    spare = np.empty(len(ids_PK), dtype=np.uint16)
    # Comparing whole columns sorts all rows at once, ten times as fast as row by row.
    for a, b in _network(top_k):
        np.minimum(columns[a], columns[b], out=spare)
        np.maximum(columns[a], columns[b], out=columns[b])
        columns[a], spare = spare, columns[a]
    return np.stack(columns)


def _network(size: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge exchange: pairs to compare, for any size."""
    pairs = []
    first = 1 << max(0, (size - 1).bit_length() - 1)
    step = first
    while step:
        other, remainder, distance = first, 0, step
        while True:
            pairs += [(i, i + distance) for i in range(size - distance) if i & step == remainder]
            if other == step:
                break
            distance, other, remainder = other - step, other >> 1, step
        step >>= 1
    return pairs


def _require_sets(sorted_KP: Columns, missing_R: npt.NDArray[np.bool_], num_experts: int) -> None:
    wrong_P = sorted_KP[-1] >= num_experts if num_experts < 65536 else np.zeros(sorted_KP.shape[1], dtype=bool)
    for below_P, above_P in pairwise(sorted_KP):
        wrong_P |= below_P == above_P
    if wrong_P.any():
        position = int(wrong_P.argmax())
        row = int(np.flatnonzero(~missing_R)[position])
        raise RoutingMismatch(
            f"row {row} names experts {sorted_KP[:, position].tolist()}, no set of {num_experts} experts: ids count "
            "from 0 and a row names each once; the routes are of another model or the capture is damaged"
        )


def _possible_modes(num_experts: int, top_k: int) -> tuple[int, ...]:
    if top_k * (num_experts + 1) > MAX_TABLE:
        return (PLAIN,)
    sets = (PLAIN, SETS, RELATED_SETS)
    return (*sets, RANKS) if comb(num_experts, top_k) < MAX_SETS else sets


def _add_rows(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> tuple[int, bool]:
    """Add the rows in the fastest mode that is about the smallest; that mode, and whether it has weights."""
    modes = _possible_modes(num_experts, len(sorted_KP))
    sample_KP = np.ascontiguousarray(sorted_KP[:, :_SAMPLE_ROWS])
    related_bits, set_bits = _sample_bits(sample_KP, num_experts) if SETS in modes else (inf, inf)
    plain_bits = 8 * compressed_size(_plain_bytes(sample_KP, num_experts)) if sample_KP.size else inf
    if modes == (PLAIN,) or plain_bits < min(related_bits, set_bits):
        writer.add(_plain_bytes(sorted_KP, num_experts))
        return PLAIN, False
    whole = _whole(sorted_KP, num_experts)
    if related_bits < _WORTH_RELATING * set_bits:
        return RELATED_SETS, _add_split(writer, _related(sorted_KP, num_experts))
    if RANKS in modes:
        tables = RankTables.of(num_experts, len(sorted_KP))
        if whole.fit()[2] > _WORTH_WEIGHING * tables.num_bits * sorted_KP.shape[1]:
            _add_ranks(writer, sorted_KP, tables)
            return RANKS, False
    return SETS, _add_split(writer, whole)


def _sample_bits(sample_KP: Columns, num_experts: int) -> tuple[float, float]:
    """What the sample takes as related sets, and as sets."""
    set_bits = _whole(sample_KP, num_experts).fit()[2]
    if len(sample_KP) == num_experts or sample_KP.shape[1] == 0:
        return inf, set_bits
    related = _related(sample_KP, num_experts)
    assert related.masks_BP is not None
    return related.fit()[2] + 8 * sum(compressed_size(mask_P) for mask_P in related.masks_BP), set_bits


def _whole(sorted_KP: Columns, num_experts: int) -> _Split:
    top_k, rows = sorted_KP.shape
    return _Split(sorted_KP, np.full(rows, top_k, dtype=np.uint16), num_experts, None)


def _related(sorted_KP: Columns, num_experts: int) -> _Split:
    top_k, rows = sorted_KP.shape
    masks_BP = np.zeros((-(-top_k // 8), rows), dtype=np.uint8)
    items_KP, counts_P = np.zeros_like(sorted_KP), np.empty(rows, dtype=np.uint16)
    _kernels().relate_rows(sorted_KP, masks_BP, items_KP, counts_P)
    return _Split(items_KP, counts_P, num_experts - top_k, masks_BP)


def _add_split(writer: StreamWriter, split: _Split) -> bool:
    """Add masks, weights, lanes and words; True if there are weights."""
    top_k, rows = split.items_KP.shape
    model, codes_U, _ = split.fit()
    for mask_P in split.masks_BP if split.masks_BP is not None else ():
        writer.add(mask_P)
    if codes_U is not None:
        writer.add(codes_U)
    lanes, lane_rows = _lanes(rows)
    items_KP, counts_P = _padded(split.items_KP, lanes * lane_rows), _padded(split.counts_P, lanes * lane_rows)
    room = lane_rows * top_k
    words, states = np.empty(lanes * room, dtype=np.uint32), np.empty(lanes, dtype=np.uint64)
    starts = np.arange(1, lanes + 1, dtype=np.uint64) * np.uint64(room)
    tables = (model.cumulative.ravel(), model.inverse.ravel())
    _kernels().push_sets(items_KP, counts_P, *tables, split.num_items, lanes, words, starts, states)
    parts = [words[int(start) : (lane + 1) * room] for lane, start in enumerate(starts)]
    writer.add(states.astype("<u8").view(np.uint8), compress=False)
    writer.add(np.array([len(part) for part in parts], dtype="<u4").view(np.uint8), compress=False)
    writer.add(np.concatenate(parts).astype("<u4").view(np.uint8), compress=False)
    return codes_U is not None


def _take_split(reader: StreamReader, mode: int, weighted: bool, shape: tuple[int, int], num_experts: int) -> Columns:
    top_k, rows = shape
    kernels = _kernels()
    counts_P, masks_BP, num_items = np.full(rows, top_k, dtype=np.uint16), None, num_experts
    if mode == RELATED_SETS:
        masks_BP = np.stack([reader.take(rows) for _ in range(-(-top_k // 8))])
        num_items = num_experts - top_k
        counts_P = top_k - np.bitwise_count(masks_BP).sum(axis=0, dtype=np.int64)
        unused = 0xFF << (top_k - 1) % 8 + 1 & 0xFF
        if (masks_BP[-1] & unused).any() or (counts_P > num_items).any():
            raise ArchiveCorrupt(f"a mask keeps what its reference, {top_k} experts, does not hold; {WAY_OUT}")
        counts_P = counts_P.astype(np.uint16)
    model = SetModel.of_equal_weights(num_items, top_k)
    if weighted:
        model = SetModel.of(WEIGHTS[reader.take(num_items)], top_k)
    items_KP = _take_items(reader, model, counts_P, num_items)
    if masks_BP is None:
        return items_KP
    ids_KP = np.empty_like(items_KP)
    kernels.resolve_rows(ids_KP, masks_BP, items_KP, counts_P)
    return ids_KP


def _take_items(reader: StreamReader, model: SetModel, counts_P: npt.NDArray[np.uint16], num_items: int) -> Columns:
    kernels = _kernels()
    top_k, rows = len(model.cumulative), len(counts_P)
    lanes, lane_rows = _lanes(rows)
    states = reader.take(8 * lanes).view("<u8").astype(np.uint64)
    ends = np.cumsum(reader.take(4 * lanes).view("<u4"), dtype=np.uint64)
    coded = reader.take()
    if coded.nbytes != 4 * int(ends[-1]):
        raise ArchiveCorrupt(f"coded sets have {coded.nbytes} bytes, their lanes {4 * int(ends[-1])}; {WAY_OUT}")
    words = coded.view("<u4").astype(np.uint32)
    starts = np.concatenate([np.zeros(1, dtype=np.uint64), ends[:-1]])
    items_KR = np.empty((top_k, lanes * lane_rows), dtype=np.uint16)
    tables = (model.cumulative.ravel(), model.inverse.ravel(), model.guesses())
    counts_R = _padded(counts_P, lanes * lane_rows)
    whole = kernels.pop_sets(items_KR, counts_R, *tables, num_items, lanes, words, starts, ends, states)
    if not whole or (starts != ends).any() or (states != LOW_STATE).any():
        raise ArchiveCorrupt(f"coded sets of {rows} rows do not end where they should; {WAY_OUT}")
    return np.ascontiguousarray(items_KR[:, :rows])


def _add_ranks(writer: StreamWriter, sorted_KP: Columns, tables: RankTables) -> None:
    words = np.zeros(sorted_KP.shape[1] * tables.num_bits // 64 + 2, dtype=np.uint64)
    _kernels().pack_ranks(sorted_KP, tables.choose_KE, tables.num_bits, words)
    writer.add(words.astype("<u8").view(np.uint8)[: -(-sorted_KP.shape[1] * tables.num_bits // 8)], compress=False)


def _take_ranks(reader: StreamReader, top_k: int, rows: int, num_experts: int) -> Columns:
    tables = RankTables.of(num_experts, top_k)
    size = -(-rows * tables.num_bits // 8)
    data = np.zeros(8 * (rows * tables.num_bits // 64 + 2), dtype=np.uint8)
    data[:size] = reader.take(size)
    ids_KP, words = np.empty((top_k, rows), dtype=np.uint16), data.view("<u8").astype(np.uint64)
    if not _kernels().unpack_ranks(ids_KP, tables.choose_KE, tables.guesses, tables.num_bits, words):
        raise ArchiveCorrupt(f"a rank of coded rows is beyond that of any {top_k} of {num_experts} experts; {WAY_OUT}")
    return ids_KP


def _lanes(rows: int) -> tuple[int, int]:
    """Lanes and rows in each."""
    lanes = LANES if rows >= MIN_ROWS_FOR_LANES else 1
    return lanes, -(-rows // lanes)


def _padded(columns: npt.NDArray[np.uint16], rows: int) -> npt.NDArray[np.uint16]:
    short = rows - columns.shape[-1]
    return columns if not short else np.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, short)])


def _plain_bytes(sorted_KP: Columns, num_experts: int) -> npt.NDArray[np.uint8]:
    width = "u1" if num_experts <= 256 else "<u2"
    return np.ascontiguousarray(sorted_KP.T, dtype=width).view(np.uint8).ravel()


def _take_plain(reader: StreamReader, top_k: int, rows: int, num_experts: int) -> Columns:
    width = np.dtype("u1" if num_experts <= 256 else "<u2")
    ids_PK = reader.take(rows * top_k * width.itemsize).view(width).reshape(rows, top_k)
    ids_KP = np.ascontiguousarray(ids_PK.T, dtype=np.uint16)
    if (ids_KP >= num_experts).any() or (ids_KP[1:] <= ids_KP[:-1]).any():
        raise ArchiveCorrupt(f"coded rows are not each {top_k} of {num_experts} experts, ascending; {WAY_OUT}")
    return ids_KP


def _add_order(writer: StreamWriter, ids_PK: npt.NDArray[np.uint16]) -> None:
    digits_KP = np.empty(ids_PK.shape[::-1], dtype=np.uint16)
    _kernels().count_smaller_before(ids_PK, digits_KP)
    for group in _digit_groups(len(digits_KP)):
        numbers_P = digits_KP[group[-1]]
        for i in group[-2::-1]:
            numbers_P = numbers_P * np.uint16(i + 1) + digits_KP[i]
        _add_plane(writer, numbers_P, prod(i + 1 for i in group) - 1)


def _take_order(reader: StreamReader, top_k: int, rows: int) -> Columns:
    digits_KP = np.zeros((top_k, rows), dtype=np.uint16)
    for group in _digit_groups(top_k):
        numbers_P = _take_plane(reader, rows, prod(i + 1 for i in group) - 1)
        for i in group:
            numbers_P, digits_KP[i] = np.divmod(numbers_P, np.uint16(i + 1))
    return digits_KP


def _digit_groups(top_k: int) -> list[list[int]]:
    """Digits 1..K-1, of which digit i is one of i + 1: neighbours that fit one byte together."""
    groups: list[list[int]] = []
    size = 257
    for i in range(1, top_k):
        size *= i + 1
        if size > 256:
            groups.append([])
            size = i + 1
        groups[-1].append(i)
    return groups


def _add_plane(writer: StreamWriter, numbers_P: npt.NDArray[np.uint16], largest: int) -> None:
    writer.add(numbers_P.astype(np.uint8))
    if largest > 255:
        writer.add((numbers_P >> 8).astype(np.uint8))


def _take_plane(reader: StreamReader, rows: int, largest: int) -> npt.NDArray[np.uint16]:
    numbers_P = reader.take(rows).astype(np.uint16)
    if largest > 255:
        numbers_P |= reader.take(rows).astype(np.uint16) << 8
    if (numbers_P > largest).any():
        raise ArchiveCorrupt(f"coded rows have {numbers_P.max()} where at most {largest} is possible; {WAY_OUT}")
    return numbers_P
