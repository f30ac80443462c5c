"""The rank of a set among all sets of K out of E: the sum of C(c_k, k + 1) over its ids c_0 < c_1 < ..."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moe_replay.archive.sorted_columns import Columns
from moe_replay.routing.trace import route_dtype

MAX_SETS = 1 << 63
"""C(E, K) from which on a rank does not fit one word."""
GUESS_BITS = 6
"""Decoding starts from guesses kept for 2**6 steps of each power of two, which are right for most ids."""

Ranks = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class RankTables:
    """What ranking and unranking sets of K out of E look up."""

    choose_KE: npt.NDArray[np.uint64]
    """[K, E + 1]: C(c, k + 1) where a set's k-th id can be c - 1 or c; beyond, 2**64 - 1."""
    guesses: npt.NDArray[np.uint16]
    """[K, steps]: the last id whose C(c, k + 1) lies below all of a step; a step is 2**-6 of a power of two."""
    misses_K: npt.NDArray[np.int64]
    """By how much a guess for the k-th id can be too small."""
    num_bits: int
    """Of one rank."""

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, num_experts: int, top_k: int) -> "RankTables":
        """The tables; C(E, K) must be below MAX_SETS."""
        choose_KE = np.full((top_k, num_experts + 1), np.iinfo(np.uint64).max)
        below = np.ones(num_experts + 1, dtype=np.uint64)
        for k in range(top_k):
            reached = num_experts - top_k + k + 1
            choose_KE[k, 0] = 0
            choose_KE[k, 1 : reached + 1] = np.cumsum(below[:reached])
            below = choose_KE[k]
        steps = np.arange(127 << GUESS_BITS, (127 + 64) << GUESS_BITS, dtype=np.uint32)
        edges = np.ceil((steps << np.uint32(23 - GUESS_BITS)).view(np.float32).astype(np.float64)).astype(np.uint64)
        edges[0] = 0
        tops = np.append(edges[1:], np.iinfo(np.uint64).max) - np.uint64(1)
        # A number this little below an edge is rounded up to it.
        edges -= edges >> np.uint64(23)
        guesses = np.stack([np.searchsorted(row, edges, side="right") - 1 for row in choose_KE])
        last = np.stack([np.searchsorted(row, tops, side="right") - 1 for row in choose_KE])
        misses_K = (last - guesses).max(axis=1)
        return cls(choose_KE, guesses.astype(np.uint16), misses_K, (math.comb(num_experts, top_k) - 1).bit_length())

    def rank(self, sorted_KP: Columns) -> Ranks:
        """The rank of each row."""
        from moe_replay.archive.expert_set_kernels import rank_rows

        ranks_P = np.empty(sorted_KP.shape[1], dtype=np.uint64)
        rank_rows(sorted_KP, self.choose_KE, ranks_P)
        return ranks_P

    def unrank(self, ranks_P: Ranks) -> Columns:
        """The sorted rows of these ranks; raises ValueError for one >= C(E, K)."""
        from moe_replay.archive.expert_set_kernels import unrank_rows

        top_k, experts_end = self.choose_KE.shape
        total = self.choose_KE[-1, -1]
        if len(ranks_P) and ranks_P.max() >= total:
            raise ValueError(f"rank {ranks_P.max()} is none of {total} sets")
        sorted_KP = np.empty((top_k, len(ranks_P)), dtype=route_dtype(experts_end - 1))
        unrank_rows(sorted_KP, ranks_P, self.choose_KE, self.guesses, self.misses_K)
        return sorted_KP
