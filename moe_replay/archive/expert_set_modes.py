"""The four ways to code sorted rows; which to take is `expert_set_choice`'s to say."""

from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_replay.archive.byte_streams import WAY_OUT, StreamReader, StreamWriter
from moe_replay.archive.expert_set_ranks import MAX_SETS, RankTables
from moe_replay.archive.sorted_columns import Columns, sorted_columns
from moe_replay.errors import ArchiveCorrupt
from moe_replay.routing.trace import route_dtype

PLAIN, RANKS, GAPS, RELATED = range(4)
"""Whole bytes per row, for zstd to find rows that come again; ranks of equally likely sets, bit by bit; gaps between
neighbouring ids, popular experts having small ids; the same of what a row has that its reference does not."""

RELABEL_EVERY = 256
"""Ids coded per expert from which on experts get new labels, which take up to two bytes per expert."""
_COUNTED_ROWS = 4096
_SHORTEST_STREAM = 16384
"""Neighbouring columns of gaps share a stream as far as they fit this many."""


@lru_cache(maxsize=16)
def possible_modes(num_experts: int, top_k: int) -> tuple[int, ...]:
    """The modes that sets of K out of E can be coded in."""
    return (PLAIN, GAPS, RELATED) if comb(num_experts, top_k) >= MAX_SETS else (RANKS, PLAIN, GAPS, RELATED)


def add_rows(writer: StreamWriter, mode: int, sorted_KP: Columns, num_experts: int) -> None:
    """Add sorted rows, each a set."""
    add = {PLAIN: _add_plain, RANKS: _add_ranks, GAPS: _add_gaps, RELATED: _add_related}[mode]
    add(writer, sorted_KP, num_experts)


def take_rows(reader: StreamReader, mode: int, shape: tuple[int, int], num_experts: int) -> Columns:
    """The sorted rows [K, P] that `add_rows` added; raises ArchiveCorrupt for what it can't have added."""
    take = {PLAIN: _take_plain, RANKS: _take_ranks, GAPS: _take_gaps, RELATED: _take_related}[mode]
    return take(reader, *shape, num_experts)


def _kernels() -> Any:
    # numba takes a second to import, which who only lists runs need not wait for.
    from moe_replay.archive import expert_set_kernels

    return expert_set_kernels


def _add_plain(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> None:
    if RANKS in possible_modes(num_experts, len(sorted_KP)):
        tables = RankTables.of(num_experts, len(sorted_KP))
        rank_bytes = tables.rank(sorted_KP).astype("<u8").view(np.uint8).reshape(-1, 8)
        writer.add(rank_bytes[:, : -(-tables.num_bits // 8)])
    else:
        writer.add(np.ascontiguousarray(sorted_KP.T, dtype=sorted_KP.dtype.newbyteorder("<")).view(np.uint8))


def _take_plain(reader: StreamReader, top_k: int, num_rows: int, num_experts: int) -> Columns:
    if RANKS in possible_modes(num_experts, top_k):
        width = -(-RankTables.of(num_experts, top_k).num_bits // 8)
        rank_bytes = np.zeros((num_rows, 8), dtype=np.uint8)
        rank_bytes[:, :width] = reader.take(num_rows * width).reshape(num_rows, width)
        return _unranked(rank_bytes.view("<u8")[:, 0].astype(np.uint64), num_experts, top_k)
    dtype = np.dtype(route_dtype(num_experts))
    ids_PK = reader.take(num_rows * top_k * dtype.itemsize).view(dtype.newbyteorder("<")).reshape(num_rows, top_k)
    ids_KP = np.ascontiguousarray(ids_PK.T, dtype=dtype)
    if (ids_KP[-1].astype(np.uint32) >= num_experts).any() or (ids_KP[1:] <= ids_KP[:-1]).any():
        raise ArchiveCorrupt(f"coded rows are not each {top_k} of {num_experts} experts, ascending; {WAY_OUT}")
    return ids_KP


def _add_ranks(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> None:
    tables = RankTables.of(num_experts, len(sorted_KP))
    ranks_P = tables.rank(sorted_KP)
    num_bits = len(ranks_P) * tables.num_bits
    words = np.zeros(num_bits // 64 + 1, dtype=np.uint64)
    _kernels().pack_bits(ranks_P, tables.num_bits, words)
    writer.add(words.astype("<u8").view(np.uint8)[: -(-num_bits // 8)], compress=False)


def _take_ranks(reader: StreamReader, top_k: int, num_rows: int, num_experts: int) -> Columns:
    width = RankTables.of(num_experts, top_k).num_bits
    size = -(-num_rows * width // 8)
    data = np.zeros(8 * (num_rows * width // 64 + 2), dtype=np.uint8)
    data[:size] = reader.take(size)
    ranks_P = np.empty(num_rows, dtype=np.uint64)
    _kernels().unpack_bits(data.view("<u8").astype(np.uint64), width, ranks_P)
    return _unranked(ranks_P, num_experts, top_k)


def _unranked(ranks_P: npt.NDArray[np.uint64], num_experts: int, top_k: int) -> Columns:
    try:
        return RankTables.of(num_experts, top_k).unrank(ranks_P)
    except ValueError as error:
        raise ArchiveCorrupt(f"coded rows of {top_k} of {num_experts} experts: {error}; {WAY_OUT}") from error


def _add_gaps(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> None:
    labels_KP = _add_labels(writer, sorted_KP, num_experts)
    gaps_KP, columns = _gaps(labels_KP), _columns_together(sorted_KP.shape[1])
    for k in range(0, len(gaps_KP), columns):
        writer.add_plane(gaps_KP[k : k + columns].ravel(), num_experts - len(gaps_KP))


def _take_gaps(reader: StreamReader, top_k: int, num_rows: int, num_experts: int) -> Columns:
    experts_E = _take_labels(reader, top_k * num_rows, num_experts)
    labels_KP = np.empty((top_k, num_rows), dtype=route_dtype(num_experts))
    columns = _columns_together(num_rows)
    for k in range(0, top_k, columns):
        part = labels_KP[k : k + columns]
        part[:] = reader.take_plane(part.size, num_experts - top_k).reshape(part.shape)
    _fill_from_gaps(labels_KP, labels_KP, num_experts)
    return _named(labels_KP, experts_E)


def _add_related(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> None:
    top_k, num_rows = sorted_KP.shape
    # Row by row, since a row's work touches all of it.
    labels_QK = _with_first_reference(_add_labels(writer, sorted_KP, num_experts).T)
    masks_PB = np.zeros((num_rows, -(-top_k // 8)), dtype=np.uint8)
    items_PK, counts_P = np.zeros((num_rows, top_k), dtype=sorted_KP.dtype), np.empty(num_rows, dtype=np.uint16)
    _kernels().relate_rows(labels_QK, masks_PB, items_PK, counts_P)
    for mask_P in masks_PB.T:
        writer.add(mask_P)
    for count in range(1, top_k + 1):
        rows = np.flatnonzero(counts_P == count)
        if len(rows):
            items_KP = np.ascontiguousarray(items_PK[rows, :count].T)
            writer.add_plane(_gaps(items_KP).ravel(), num_experts - top_k - count)


def _take_related(reader: StreamReader, top_k: int, num_rows: int, num_experts: int) -> Columns:
    experts_E = _take_labels(reader, top_k * num_rows, num_experts)
    masks_PB = np.stack([reader.take(num_rows) for _ in range(-(-top_k // 8))], axis=1)
    counts_P = top_k - np.bitwise_count(masks_PB).sum(axis=1, dtype=np.int64)
    unused = 0xFF << (top_k - 1) % 8 + 1 & 0xFF
    if (masks_PB[:, -1] & unused).any() or (counts_P > num_experts - top_k).any():
        raise ArchiveCorrupt(f"a mask keeps what its reference, {top_k} experts, does not hold; {WAY_OUT}")
    items_PK = np.zeros((num_rows, top_k), dtype=route_dtype(num_experts))
    for count in range(1, top_k + 1):
        rows = np.flatnonzero(counts_P == count)
        if len(rows):
            gaps = reader.take_plane(count * len(rows), num_experts - top_k - count).reshape(count, len(rows))
            items_KP = np.empty(gaps.shape, dtype=items_PK.dtype)
            _fill_from_gaps(items_KP, gaps, num_experts - top_k)
            items_PK[rows, :count] = items_KP.T
    labels_QK = _with_first_reference(np.empty_like(items_PK))
    _kernels().resolve_rows(labels_QK, masks_PB, items_PK, counts_P.astype(np.uint16))
    return _named(np.ascontiguousarray(labels_QK[1:].T), experts_E)


def _with_first_reference(labels_PK: Columns) -> Columns:
    """[P + 1, K]: what row 0 refers to, then the rows."""
    return np.concatenate([np.arange(labels_PK.shape[1], dtype=labels_PK.dtype)[None], labels_PK])


def _columns_together(num_rows: int) -> int:
    # What zstd tells of a stream's bytes takes too much of a short one.
    return max(1, _SHORTEST_STREAM // max(1, num_rows))


def _gaps(items_KP: Columns) -> Columns:
    """How many items lie between each and the one before it."""
    gaps_KP = items_KP.copy()
    gaps_KP[1:] -= items_KP[:-1] + items_KP.dtype.type(1)
    return gaps_KP


def _fill_from_gaps(items_KP: Columns, gaps: Any, num_items: int) -> None:
    """The inverse of `_gaps`, for gaps taken one column after the other; raises ArchiveCorrupt beyond `num_items`."""
    # A sum of K gaps, each at most U - K, and K ones.
    next_P = np.zeros(items_KP.shape[1], dtype=np.uint16 if num_items <= 256 else np.uint32)
    for items_P, gaps_P in zip(items_KP, gaps, strict=True):
        next_P += gaps_P
        items_P[:] = next_P
        next_P += 1
    if (next_P > num_items).any():
        raise ArchiveCorrupt(f"gaps of coded rows add up to {next_P.max()} of {num_items} items; {WAY_OUT}")


def _add_labels(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> Columns:
    """Rows by their experts' labels, sorted: the more popular an expert, the smaller its label."""
    if sorted_KP.size < RELABEL_EVERY * num_experts:
        return sorted_KP
    step = -(-sorted_KP.shape[1] // _COUNTED_ROWS)
    times_E = np.bincount(sorted_KP[:, ::step].ravel(), minlength=num_experts)
    experts_E = np.argsort(-times_E, kind="stable").astype(sorted_KP.dtype)
    writer.add_plane(experts_E, num_experts - 1)
    labels_E = np.empty_like(experts_E)
    labels_E[experts_E] = np.arange(num_experts, dtype=experts_E.dtype)
    return sorted_columns(labels_E[sorted_KP])


def _take_labels(reader: StreamReader, num_ids: int, num_experts: int) -> Columns | None:
    if num_ids < RELABEL_EVERY * num_experts:
        return None
    experts_E = reader.take_plane(num_experts, num_experts - 1)
    if (np.bincount(experts_E, minlength=num_experts) != 1).any():
        raise ArchiveCorrupt(f"labels of coded rows do not name each of {num_experts} experts once; {WAY_OUT}")
    return experts_E


def _named(labels_KP: Columns, experts_E: Columns | None) -> Columns:
    return labels_KP if experts_E is None else sorted_columns(experts_E[labels_KP])
