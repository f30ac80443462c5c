"""The compiled loops of the expert-set codec; their callers say what the numbers mean and check what goes in.

Importing this module imports numba, so it is imported when the first chunk is coded. Machine code is cached beside the
source, or under NUMBA_CACHE_DIR. Indices are unsigned throughout: numba would otherwise test each for a negative one.
"""

import numpy as np
from numba import njit

from moe_replay.archive.expert_set_ranks import GUESS_BITS

_U = np.uint64
_ONE = _U(1)
_GUESS_SHIFT, _FIRST_GUESS = _U(23 - GUESS_BITS), _U(127 << GUESS_BITS)
_HASH_FACTOR = _U(0x9E3779B97F4A7C15)
_HASH_SHIFT = _U(48)

_NO_ID = _U(1 << 40)

_WORD = _U(64)
_BLOCK = 512
"""Rows whose ranks are worked on together."""


@njit(cache=True, nogil=True)
def _hash_row(ids_QK, row):
    code = _U(0)
    for k in range(ids_QK.shape[1]):
        code = (code + _U(ids_QK[row, k]) + _ONE) * _HASH_FACTOR
    return code


@njit(cache=True, nogil=True)
def _find_reference(row, hashes_P, seen):
    """The row that followed the last occurrence of the two rows before `row`, else the row before it; notes `row`."""
    if row < 2:
        return row - 1
    slot = ((hashes_P[row - 1] + _ONE) * _HASH_FACTOR + hashes_P[row - 2]) >> _HASH_SHIFT
    found = seen[slot]
    seen[slot] = row
    if found >= 2 and hashes_P[found - 1] == hashes_P[row - 1]:
        return found
    return row - 1


@njit(cache=True, nogil=True)
def relate_rows(ids_QK, masks_PB, items_PK, counts_P):
    """Split each sorted row into what it keeps of its reference (a mask) and what is new (ranks among the rest).

    Row r is at r + 1 of `ids_QK`, the first row's reference at 0.
    """
    rows, top_k = items_PK.shape
    hashes_P, seen = np.empty(rows, np.uint64), np.zeros(1 << 16, np.int32)
    size = _U(top_k)
    # No slices, since each would count references to its array.
    for at in range(rows):
        row, here, there = _U(at), _U(at + 1), _U(_find_reference(at, hashes_P, seen) + 1)
        hashes_P[row] = _hash_row(ids_QK, here)
        k, below, new = _U(0), _U(0), _U(0)
        # A merge that adds what it compares, since a guess which id is the smaller is as often wrong as right.
        while k < size and below < size:
            expert, other = ids_QK[here, k], ids_QK[there, below]
            masks_PB[row, below >> _U(3)] |= np.uint8(_U(expert == other) << (below & _U(7)))
            items_PK[row, new] = expert - below
            new += _U(expert < other)
            k += _U(expert <= other)
            below += _U(expert >= other)
        while k < size:
            items_PK[row, new] = ids_QK[here, k] - below
            new += _ONE
            k += _ONE
        counts_P[row] = new


@njit(cache=True, nogil=True)
def resolve_rows(ids_QK, masks_PB, items_PK, counts_P):
    """The inverse of `relate_rows`; each row's mask must have K less its count of bits set."""
    rows, top_k = items_PK.shape
    hashes_P, seen = np.empty(rows, np.uint64), np.zeros(1 << 16, np.int32)
    size = _U(top_k)
    for at in range(rows):
        row, here, there = _U(at), _U(at + 1), _U(_find_reference(at, hashes_P, seen) + 1)
        out, below, new, count = _U(0), _U(0), _U(0), _U(counts_P[row])
        while out < size:
            fresh = _U(items_PK[row, new]) + below if new < count else _NO_ID
            other = _U(ids_QK[there, below]) if below < size else _NO_ID
            kept = _U(masks_PB[row, below >> _U(3)] >> (below & _U(7))) & _ONE if below < size else _U(0)
            is_other = other <= fresh
            ids_QK[here, out] = other if is_other else fresh
            out += kept if is_other else _ONE
            below += _U(is_other)
            new += _U(not is_other)
        hashes_P[row] = _hash_row(ids_QK, here)


@njit(cache=True, nogil=True)
def count_smaller_before(ids_RK, digits_KR):
    """Digit i of a row: how many of the ids before the i-th are smaller than it; 0..i."""
    rows, top_k = ids_RK.shape
    for row in range(rows):
        for i in range(top_k):
            smaller = 0
            for j in range(i):
                smaller += ids_RK[row, j] < ids_RK[row, i]
            digits_KR[i, row] = smaller


@njit(cache=True, nogil=True)
def reorder_rows(ids_RK, digits_KR):
    """Reorder sorted rows in place as their digits say; digit i must be in 0..i."""
    rows, top_k = ids_RK.shape
    rest = np.empty(top_k, ids_RK.dtype)
    for row in range(rows):
        rest[:] = ids_RK[row]
        for i in range(top_k - 1, -1, -1):
            taken = digits_KR[i, row]
            ids_RK[row, i] = rest[taken]
            for j in range(taken, i):
                rest[j] = rest[j + 1]


@njit(cache=True, nogil=True)
def rank_rows(ids_KP, choose_KE, ranks_P):
    """The rank of each sorted row."""
    top_k, rows = ids_KP.shape
    for start in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - start)
        ranks = ranks_P[start : start + size]
        ranks[:] = _U(0)
        for k in range(top_k):
            column, choose = ids_KP[k, start : start + size], choose_KE[k]
            for i in range(size):
                ranks[i] += choose[_U(column[i])]


@njit(cache=True, nogil=True)
def unrank_rows(ids_KP, ranks_P, choose_KE, guesses, misses_K):
    """The inverse of `rank_rows`, for ranks that sets have."""
    top_k, rows = ids_KP.shape
    rest, experts = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for start in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - start)
        rest[:size] = ranks_P[start : start + size]
        for k in range(top_k - 1, -1, -1):
            column, choose, guess = ids_KP[k, start : start + size], choose_KE[k], guesses[k]
            for i in range(size):
                bucket = _U(np.float32(max(rest[i], _ONE)).view(np.uint32)) >> _GUESS_SHIFT
                experts[i] = guess[bucket - _FIRST_GUESS]
            # As many steps for all, since a loop without branches takes eight rows at a time.
            for _ in range(misses_K[k]):
                for i in range(size):
                    experts[i] += _U(choose[experts[i] + _ONE] <= rest[i])
            for i in range(size):
                column[i] = experts[i]
                rest[i] -= choose[experts[i]]


@njit(cache=True, nogil=True)
def pack_bits(ranks_P, num_bits, words):
    """Write the low bits of all ranks one after the other to `words`, which have one to spare."""
    word, used, width = _U(0), _U(0), _U(num_bits)
    filled = _U(0)
    for i in range(len(ranks_P)):
        word |= ranks_P[i] << used
        used += width
        if used >= _WORD:
            words[filled] = word
            filled += _ONE
            used -= _WORD
            # Two shifts, since one by 64 means nothing.
            word = (ranks_P[i] >> (width - used - _ONE)) >> _ONE if used else _U(0)
    words[filled] = word


@njit(cache=True, nogil=True)
def unpack_bits(words, num_bits, ranks_P):
    """The inverse of `pack_bits`; `words` must have one to spare."""
    bit, width = _U(0), _U(num_bits)
    mask = (_ONE << width) - _ONE
    for i in range(len(ranks_P)):
        word, shift = bit >> _U(6), bit & _U(63)
        above = (words[word + _ONE] << _ONE) << (_U(63) - shift)
        ranks_P[i] = ((words[word] >> shift) | above) & mask
        bit += width
