"""The compiled loops of the expert-set codec; `expert_sets` says what the numbers mean and checks what goes in.

Importing this module imports numba, so it is imported when the first chunk is coded. Machine code is cached beside the
source, or under NUMBA_CACHE_DIR. Indices are unsigned throughout: numba would otherwise test each for a negative one.
"""

import numpy as np
from numba import njit

from moe_replay.archive.expert_set_model import GUESS_BITS, LOW_STATE

_U = np.uint64
_ONE, _SLOT_BITS, _WORD_BITS = _U(1), _U(20), _U(32)
_SLOT_MASK = _U(0xFFFFF)
_LOW_STATE = _U(LOW_STATE)
_RENORM_SHIFT = _U(43)
"""A state below frequency << 43 stays below 2**63 when a symbol is pushed."""
_GUESS_SHIFT, _FIRST_GUESS = _U(23 - GUESS_BITS), _U(127 << GUESS_BITS)
_HASH_FACTOR = _U(0x9E3779B97F4A7C15)
_HASH_SHIFT = _U(48)

_WORD = _U(64)
_BLOCK = 512
"""Rows whose ranks are worked on together."""


@njit(cache=True, nogil=True, error_model="numpy")
def push_sets(items_KR, counts_R, cumulative, inverse, num_items, lanes, words, ends, states):
    """Push the sets of all rows, last row first, onto `lanes` states; word stacks grow down from `ends`.

    On return `ends` holds where each lane's words begin. Lane l has rows l*R/lanes.. of the R padded rows.
    """
    top_k, rows = items_KR.shape
    lane_rows = rows // lanes
    stride = _U(num_items + 1)
    for lane in range(lanes):
        states[lane] = _LOW_STATE
    for t in range(lane_rows - 1, -1, -1):
        for k in range(top_k - 1, -1, -1):
            for lane in range(lanes):
                row = _U(lane * lane_rows + t)
                if k >= counts_R[row]:
                    continue
                left = _U(counts_R[row] - k)
                base = (left - _ONE) * stride
                last = _U(num_items) - left
                item = _U(items_KR[_U(k), row])
                first = _U(items_KR[_U(k - 1), row]) + _ONE if k > 0 else _U(0)
                scale = inverse[base + first]
                low = ((_U(cumulative[base + item + _ONE]) * scale) >> _WORD_BITS) + last - item
                high = ((_U(cumulative[base + item]) * scale) >> _WORD_BITS) + last - item + _ONE
                frequency = high - low
                state = states[_U(lane)]
                if state >= frequency << _RENORM_SHIFT:
                    ends[_U(lane)] -= _ONE
                    words[ends[_U(lane)]] = np.uint32(state)
                    state >>= _WORD_BITS
                quotient = state // frequency
                states[_U(lane)] = (quotient << _SLOT_BITS) + low + (state - quotient * frequency)


@njit(cache=True, nogil=True, error_model="numpy")
def pop_sets(items_KR, counts_R, cumulative, inverse, guesses, num_items, lanes, words, starts, ends, states):
    """The inverse of `push_sets`, first row first; False for what it can't have written.

    Whatever the words are, every item found lies between its predecessor and the last one possible.
    """
    top_k, rows = items_KR.shape
    lane_rows = rows // lanes
    stride = _U(num_items + 1)
    first_L = np.zeros(lanes, np.uint64)
    for t in range(lane_rows):
        for lane in range(lanes):
            first_L[_U(lane)] = _U(0)
        for k in range(top_k):
            for lane in range(lanes):
                row = _U(lane * lane_rows + t)
                if k >= counts_R[row]:
                    continue
                left = _U(counts_R[row] - k)
                base = (left - _ONE) * stride
                last = _U(num_items) - left
                first = first_L[_U(lane)]
                state = states[_U(lane)]
                slot = state & _SLOT_MASK
                scale = inverse[base + first]
                value = (slot * _U(cumulative[base + first])) >> _SLOT_BITS
                bucket = _U(np.float32(value | _ONE).view(np.uint32)) >> _GUESS_SHIFT
                item = max(_U(guesses[left - _ONE, bucket - _FIRST_GUESS]), first)
                low = ((_U(cumulative[base + item + _ONE]) * scale) >> _WORD_BITS) + last - item
                high = ((_U(cumulative[base + item]) * scale) >> _WORD_BITS) + last - item + _ONE
                while high <= slot:
                    if item == first:
                        return False
                    item -= _ONE
                    low = high
                    high = ((_U(cumulative[base + item]) * scale) >> _WORD_BITS) + last - item + _ONE
                while low > slot:
                    item += _ONE
                    high = low
                    low = ((_U(cumulative[base + item + _ONE]) * scale) >> _WORD_BITS) + last - item
                state = (high - low) * (state >> _SLOT_BITS) + slot - low
                if state < _LOW_STATE:
                    start = starts[_U(lane)]
                    if start >= ends[_U(lane)]:
                        return False
                    state = (state << _WORD_BITS) | _U(words[start])
                    starts[_U(lane)] = start + _ONE
                states[_U(lane)] = state
                first_L[_U(lane)] = item + _ONE
                items_KR[_U(k), row] = item
    return True


@njit(cache=True, nogil=True)
def _hash_row(ids_KR, row):
    code = _U(0)
    for k in range(ids_KR.shape[0]):
        code = (code + _U(ids_KR[k, row]) + _ONE) * _HASH_FACTOR
    return code


@njit(cache=True, nogil=True)
def _find_reference(row, hashes_R, seen):
    """The row that followed the last occurrence of the two rows before `row`, else the row before it; notes `row`."""
    if row < 2:
        return row - 1
    slot = ((hashes_R[row - 1] + _ONE) * _HASH_FACTOR + hashes_R[row - 2]) >> _HASH_SHIFT
    found = seen[slot]
    seen[slot] = row
    if found >= 2 and hashes_R[found - 1] == hashes_R[row - 1]:
        return found
    return row - 1


@njit(cache=True, nogil=True)
def relate_rows(ids_KR, masks_BR, items_KR, counts_R):
    """Split each sorted row into what it keeps of its reference (a mask) and what is new (ranks among the rest)."""
    top_k, rows = ids_KR.shape
    hashes_R, seen = np.empty(rows, np.uint64), np.zeros(1 << 16, np.int32)
    for row in range(rows):
        reference = _find_reference(row, hashes_R, seen)
        hashes_R[row] = _hash_row(ids_KR, row)
        kept, new = 0, 0
        for k in range(top_k):
            expert = ids_KR[k, row]
            while kept < top_k and (ids_KR[kept, reference] if reference >= 0 else kept) < expert:
                kept += 1
            if kept < top_k and (ids_KR[kept, reference] if reference >= 0 else kept) == expert:
                masks_BR[kept >> 3, row] |= 1 << (kept & 7)
            else:
                items_KR[new, row] = expert - kept
                new += 1
        counts_R[row] = new


@njit(cache=True, nogil=True)
def resolve_rows(ids_KR, masks_BR, items_KR, counts_R):
    """The inverse of `relate_rows`; each row's mask must have K less its count of bits set."""
    top_k, rows = ids_KR.shape
    hashes_R, seen = np.empty(rows, np.uint64), np.zeros(1 << 16, np.int32)
    for row in range(rows):
        reference = _find_reference(row, hashes_R, seen)
        position, below, new, out = 0, 0, 0, 0
        while out < top_k:
            while position < top_k and not masks_BR[position >> 3, row] >> (position & 7) & 1:
                position += 1
            kept = top_k << 20
            if position < top_k:
                kept = np.int64(ids_KR[position, reference]) if reference >= 0 else position
            fresh = 1 << 40
            if new < counts_R[row]:
                rank = np.int64(items_KR[new, row])
                while below < top_k and (ids_KR[below, reference] if reference >= 0 else below) <= rank + below:
                    below += 1
                fresh = rank + below
            if fresh < kept:
                ids_KR[out, row] = fresh
                new += 1
            else:
                ids_KR[out, row] = kept
                position += 1
            out += 1
        hashes_R[row] = _hash_row(ids_KR, row)


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
def restore_order(ids_RK, digits_KR):
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
def pack_ranks(ids_KP, choose_KE, num_bits, words):
    """Write the rank of each sorted row to `words`, which are zero and have one to spare."""
    top_k, rows = ids_KP.shape
    ranks = np.empty(_BLOCK, np.uint64)
    bit, width = _U(0), _U(num_bits)
    for start in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - start)
        ranks[:size] = _U(0)
        for k in range(top_k):
            column, choose = ids_KP[k, start : start + size], choose_KE[k]
            for i in range(size):
                ranks[i] += choose[_U(column[i])]
        for i in range(size):
            word, shift = bit >> _U(6), bit & _U(63)
            words[word] |= ranks[i] << shift
            if shift + width > _WORD:
                words[word + _ONE] = ranks[i] >> (_WORD - shift)
            bit += width


@njit(cache=True, nogil=True)
def unpack_ranks(ids_KP, choose_KE, guesses, num_bits, words):
    """The inverse of `pack_ranks`; False for a rank that no set has. `words` must have one to spare."""
    top_k, rows = ids_KP.shape
    total = choose_KE[top_k - 1, choose_KE.shape[1] - 1]
    ranks = np.empty(_BLOCK, np.uint64)
    bit, width = _U(0), _U(num_bits)
    mask = (_ONE << width) - _ONE
    for start in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - start)
        possible = True
        for i in range(size):
            word, shift = bit >> _U(6), bit & _U(63)
            # Two shifts, since one by 64 means nothing.
            above = (words[word + _ONE] << _ONE) << (_U(63) - shift)
            ranks[i] = ((words[word] >> shift) | above) & mask
            possible &= ranks[i] < total
            bit += width
        if not possible:
            return False
        for k in range(top_k - 1, -1, -1):
            column, choose, guess = ids_KP[k, start : start + size], choose_KE[k], guesses[k]
            for i in range(size):
                rank = ranks[i]
                bucket = _U(np.float32(max(rank, _ONE)).view(np.uint32)) >> _GUESS_SHIFT
                expert = _U(guess[bucket - _FIRST_GUESS])
                while choose[expert + _ONE] <= rank:
                    expert += _ONE
                column[i] = expert
                ranks[i] = rank - choose[expert]
    return True
