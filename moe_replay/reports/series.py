"""Rows of numbers that figures draw, each of one run. NaN where nothing is stored.

Legend of shapes: N iterations, P mini-steps, L MoE layers, B thresholds or numbers of layers, D bins of deviation.
"""

import numpy as np

from moe_replay.reports.extremes import THRESHOLDS_B, ExtremeCurve
from moe_replay.reports.groups import Value
from moe_replay.reports.runs import RunResults
from moe_replay.routing.statistics import RoutingStatistics

DEVIATIONS = ("0", "1", "2", "3plus")


def by_iteration(run: RunResults, value: Value) -> np.ndarray:
    """A number of each iteration, [N]."""
    found = [value(part.metrics) for part in run.iterations]
    return np.array([np.nan if number is None else number for number in found], dtype=np.float64)


def agreements(run: RunResults) -> np.ndarray:
    """Agreement by iteration and mini-step, [N, P]."""
    keys = [f"routing/agreement_step_{step}" for step in range(1, run.mini_steps + 1)]
    return np.array([[part.metrics.get(key, np.nan) for key in keys] for part in run.iterations], dtype=np.float64)


def agreement_by_mini_step(run: RunResults) -> np.ndarray:
    """Mean over iterations of the agreement at each mini-step, [P]."""
    return mean_of_known(agreements(run))


def coverage_gaps(run: RunResults) -> np.ndarray:
    """Coverage gap by iteration and mini-step, mean over layers, [N, P]."""
    gaps_NP = np.full((len(run.iterations), run.mini_steps), np.nan)
    for row, part in enumerate(run.iterations):
        for column, step in enumerate(part.routing.mini_steps[: run.mini_steps] if part.routing else ()):
            gaps_NP[row, column] = np.mean(step.coverage_gap_L) if step.coverage_gap_L else np.nan
    return gaps_NP


def coverage_gap_by_mini_step(run: RunResults) -> np.ndarray:
    """Mean over iterations of the coverage gap at each mini-step, [P]."""
    return mean_of_known(coverage_gaps(run))


def deviations(run: RunResults) -> np.ndarray:
    """Share of (token, layer) by experts that differ from the reference, mean over iterations, [D]."""
    keys = [f"routing/deviation_{name}" for name in DEVIATIONS]
    return mean_of_known(np.array([[part.metrics.get(key, np.nan) for key in keys] for part in run.iterations]))


def extreme_shares(run: RunResults) -> np.ndarray:
    """F(τ) over the tokens of all iterations, [B]."""
    curves = [part.extremes for part in run.iterations if part.extremes is not None]
    return ExtremeCurve.joined(curves).shares if curves else np.full(len(THRESHOLDS_B), np.nan)


def differing_layers(run: RunResults) -> np.ndarray:
    """Share of tokens by the number of layers in which rollout and trainer differ, over all iterations, [B]."""
    counts = [part.routing.differing_layers_B for part in run.iterations if part.routing is not None]
    if not counts:
        return np.full(1, np.nan)
    total_B = np.array(counts, dtype=np.float64).sum(axis=0)
    return total_B / total_B.sum() if total_B.any() else np.full(len(total_B), np.nan)


def imbalances(statistics: RoutingStatistics) -> np.ndarray:
    """Tokens of each layer's busiest expert over the mean of its experts; NaN where it served none, [L]."""
    load_LE = np.array(statistics.load_LE, dtype=np.float64)
    mean_L = load_LE.mean(axis=-1)
    return np.divide(load_LE.max(axis=-1), mean_L, out=np.full(len(mean_L), np.nan), where=mean_L > 0)


def mean_of_known(values_NX: np.ndarray) -> np.ndarray:
    """Mean over the rows that have a value, [X]."""
    return np.ma.filled(np.ma.masked_invalid(values_NX).mean(axis=0).astype(np.float64), np.nan)
