"""How sure a number of a few noisy runs is: bootstrap intervals over seeds and iterations.

Seeds are resampled, then the iterations of each drawn seed, in blocks of neighbours since neighbours resemble each
other; the interval is the percentile interval of what comes out. Differences between two methods are paired: both are
resampled at the same seeds and iterations. With few seeds such intervals are too narrow rather than too wide, most of
all with one, which says nothing of how seeds differ.

Legend: S seeds, N iterations, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Statistic = Literal["mean", "median", "p90"]

CONFIDENCE = 0.95
RESAMPLES = 2000
_SEED = 20250
_FEWEST_VALUES = 6
"""n differences all have one sign by chance with probability 2^(1 - n), which for less than 6 is more than 5 %."""

_STATISTICS: dict[Statistic, Callable[..., np.ndarray]] = {
    "mean": np.mean,
    "median": np.median,
    "p90": lambda values, axis: np.quantile(values, 0.9, axis=axis),
}


@dataclass(frozen=True)
class Estimate:
    """A statistic of S runs of one method, or of the difference of two methods, and its interval."""

    value: float
    interval: tuple[float, float] | None
    """None where there are less than six values, of seeds and iterations together."""
    seeds: int
    iterations: int

    @property
    def verdict(self) -> Literal["lower", "higher", "within noise", "too few values"]:
        """Of a difference: its sign, or that its interval contains 0 (or has none)."""
        if self.interval is None:
            return "too few values"
        low, high = self.interval
        if low <= 0 <= high:
            return "within noise"
        return "lower" if high < 0 else "higher"


def estimate(values_SN: np.ndarray, statistic: Statistic) -> Estimate:
    """The statistic over all values, and its interval."""
    of = _STATISTICS[statistic]
    resampled_R = of(_resampled(values_SN, _draws(values_SN.shape)), axis=1)
    return _estimate(float(of(values_SN, axis=None)), resampled_R, values_SN.shape)


def paired_difference(values_SN: np.ndarray, baseline_SN: np.ndarray, statistic: Statistic) -> Estimate:
    """Statistic of `values_SN` minus that of `baseline_SN`; rows and columns are the same seeds and iterations."""
    if values_SN.shape != baseline_SN.shape:
        raise ValueError(f"paired values must have one shape, got {values_SN.shape} and {baseline_SN.shape}")
    of, draws = _STATISTICS[statistic], _draws(values_SN.shape)
    resampled_R = of(_resampled(values_SN, draws), axis=1) - of(_resampled(baseline_SN, draws), axis=1)
    return _estimate(float(of(values_SN, axis=None) - of(baseline_SN, axis=None)), resampled_R, values_SN.shape)


def _draws(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Indexes of seeds [R, S, 1] and of iterations [R, S, N]: the same for equal shapes, so that reports repeat."""
    num_seeds, num_iterations = shape
    rng = np.random.default_rng(_SEED)
    seeds_RS1 = rng.integers(num_seeds, size=(RESAMPLES, num_seeds, 1))
    block = max(1, round(num_iterations ** (1 / 3)))
    starts = rng.integers(num_iterations, size=(RESAMPLES, num_seeds, -(-num_iterations // block), 1))
    # Blocks wrap around, or the first and the last iterations would be drawn less often.
    iterations = (starts + np.arange(block)) % num_iterations
    return seeds_RS1, iterations.reshape(RESAMPLES, num_seeds, -1)[..., :num_iterations]


def _resampled(values_SN: np.ndarray, draws: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Values of each resample, [R, S * N]."""
    return values_SN[draws].reshape(RESAMPLES, -1)


def _estimate(value: float, resampled_R: np.ndarray, shape: tuple[int, ...]) -> Estimate:
    seeds, iterations = shape
    interval = None
    if seeds * iterations >= _FEWEST_VALUES:
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(resampled_R, [tail, 1 - tail])
        interval = float(low), float(high)
    return Estimate(value, interval, seeds, iterations)
