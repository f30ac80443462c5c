"""Extreme tokens by threshold: R3's F(τ) (arXiv 2510.11370).

Legend: B thresholds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_replay.archive.log_probs import LogProbs

THRESHOLDS_B = 1 + np.geomspace(1e-3, 99.0, 96)
"""Ratios τ at which tokens are counted, the same for all so that counts can be added; dense near 1, where most are."""


@dataclass(frozen=True)
class ExtremeCurve:
    """How many response tokens have π_old/μ or μ/π_old above each of `THRESHOLDS_B`."""

    tokens: int
    above_B: np.ndarray
    """int64 [B]."""

    @property
    def shares(self) -> np.ndarray:
        """F(τ), float64 [B], 0..1; NaN without tokens."""
        return self.above_B / self.tokens if self.tokens else np.full(len(self.above_B), np.nan)

    @classmethod
    def of(cls, log_probs: LogProbs) -> "ExtremeCurve":
        """Count over the log-probs of one iteration."""
        distance_T = np.sort(np.abs(np.subtract(log_probs.rollout_T, log_probs.old_T, dtype=np.float64)))
        up_to_B = np.searchsorted(distance_T, np.log(THRESHOLDS_B), side="right")
        return cls(len(distance_T), (len(distance_T) - up_to_B).astype(np.int64))

    @classmethod
    def joined(cls, curves: Iterable["ExtremeCurve"]) -> "ExtremeCurve":
        """The curve over all tokens of several, one at least."""
        parts = list(curves)
        return cls(sum(part.tokens for part in parts), np.array([part.above_B for part in parts]).sum(axis=0))
