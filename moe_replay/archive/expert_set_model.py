"""How likely a set of experts is: each expert has a weight, a set is as likely as the product of its experts' weights.

With equal weights every set costs log2 C(E, n) bits; with weights of the experts' own frequencies, a popular expert's
set costs less. Given the smallest n - 1 experts of a set the next one depends on the last of them alone, so one table
of running sums per number of experts left describes all conditional distributions.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SLOT_BITS = 20
"""Conditional probabilities are multiples of 2**-20."""
LOW_STATE = 1 << 31
"""What a coder's state starts from and never falls below."""
GUESS_BITS = 6
"""Decoding starts from guesses kept for 2**6 steps of each power of two, which are right for most ids."""
_CUMULATIVE_ONE = 1 << 31
_CODES = np.arange(256, dtype=np.int64)
WEIGHTS = ((8 + (_CODES & 7)) << (_CODES >> 3)).astype(np.float64)
"""The weight that each byte names: 3 bits of mantissa, 5 of exponent."""


@dataclass(frozen=True)
class SetModel:
    """Tables of the sets of 1 to n out of U items; every number follows from the weights in exact steps."""

    cumulative: npt.NDArray[np.uint32]
    """[n, U + 1]: row m-1 has the weight of all m-sets of items x.. over that of items 0.., times 2**31, floored."""
    inverse: npt.NDArray[np.uint64]
    """[n, U + 1]: what scales row m-1, from item x on, to 2**20 less one slot per item that can come next."""
    log2_total: npt.NDArray[np.float64]
    """[n + 1]: log2 of the weight of all m-sets."""

    @classmethod
    def of(cls, weights_U: npt.NDArray[np.float64], top_k: int) -> "SetModel":
        """The tables for `weights_U`, each at least 1, and sets of up to `top_k` items."""
        num_items = len(weights_U)
        cumulative = np.zeros((top_k, num_items + 1), dtype=np.uint32)
        inverse = np.zeros((top_k, num_items + 1), dtype=np.uint64)
        log2_total = np.zeros(top_k + 1)
        share = np.ones(num_items + 1)
        for m in range(1, min(top_k, num_items) + 1):
            possible = num_items - m + 1
            sums = np.zeros(num_items + 1)
            # cumsum adds one after the other, from the last item on: the format fixes this order.
            sums[:possible] = np.cumsum((weights_U[:possible] * share[1 : possible + 1])[::-1])[::-1]
            log2_total[m] = log2_total[m - 1] + math.log2(sums[0])
            share = sums / sums[0]
            cumulative[m - 1] = np.floor(share * _CUMULATIVE_ONE)
            spare = (1 << SLOT_BITS) - np.arange(possible, 0, -1, dtype=np.uint64)
            inverse[m - 1, :possible] = (spare << np.uint64(32)) // np.maximum(cumulative[m - 1, :possible], 1)
        return cls(cumulative, inverse, log2_total)

    @classmethod
    @lru_cache(maxsize=16)
    def of_equal_weights(cls, num_items: int, top_k: int) -> "SetModel":
        """The tables for weights of 1."""
        return cls.of(np.ones(num_items), top_k)

    def guesses(self) -> npt.NDArray[np.uint16]:
        """[n, steps]: the last item whose sum lies above all of a step; a step is 2**-6 of a power of two.

        Decoding is faster for good guesses, never different.
        """
        steps = np.arange(127 << GUESS_BITS, (127 + 32) << GUESS_BITS, dtype=np.uint32)
        tops = ((steps + np.uint32(1)) << np.uint32(23 - GUESS_BITS)).view(np.float32).astype(np.int64) - 1
        rows = [np.searchsorted(-row.astype(np.int64), -tops, side="left") for row in self.cumulative]
        return np.maximum(np.stack(rows) - 1, 0).astype(np.uint16)


def fit_weights(times_U: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.uint8]:
    """Bytes of WEIGHTS for items that `times_U` of `num_rows` sets hold: about the odds of each."""
    share_U = (times_U + 0.5) / (num_rows + 1)
    odds_U = share_U / (1 - share_U)
    wanted_U = odds_U * (WEIGHTS[-1] / odds_U.max())
    return np.searchsorted(np.sqrt(WEIGHTS[1:] * WEIGHTS[:-1]), wanted_U).astype(np.uint8)


def coded_bits(
    model: SetModel, codes_U: npt.NDArray[np.uint8], times_U: npt.NDArray[np.int64], sizes_n: npt.NDArray[np.int64]
) -> float:
    """Bits of sets that hold each item `times_U` times, `sizes_n[n]` of them having n items."""
    return float(sizes_n @ model.log2_total[: len(sizes_n)] - times_U @ np.log2(WEIGHTS[codes_U]))


@dataclass(frozen=True)
class RankTables:
    """Tables of all sets of K out of E, for the ranks that `set_rank_kernels` speaks of."""

    choose_KE: npt.NDArray[np.uint64]
    """[K, E + 1]: C(c, k + 1) where a set's k-th id can be c - 1 or c; beyond, 2**64 - 1."""
    guesses: npt.NDArray[np.uint16]
    """[K, steps]: the last id whose C(c, k + 1) lies below all of a step; as in `SetModel.guesses`."""
    num_bits: int
    """Of one rank."""

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, num_experts: int, top_k: int) -> "RankTables":
        """The tables; C(E, K) must be below 2**63."""
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
        # A number this little below an edge is rounded up to it.
        edges -= edges >> np.uint64(23)
        guesses = np.stack([np.searchsorted(row, edges, side="right") - 1 for row in choose_KE]).astype(np.uint16)
        return cls(choose_KE, guesses, (math.comb(num_experts, top_k) - 1).bit_length())
