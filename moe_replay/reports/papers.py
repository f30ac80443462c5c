"""What the papers measured, beside what the runs of a report did. Models and scale differ; definitions don't.

R3 is arXiv 2510.11370, PR2 is arXiv 2606.00395.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_replay.reports.groups import MethodRuns, RunGroup, Value
from moe_replay.reports.measures import Unit, metric, shown

_R3, _PR2 = "R3, Qwen3-30B-A3B", "PR2, Qwen3-30B-A3B"
_ABSENT = "-"
_KL = metric("mismatch/kl_k3")
_EXTREME = metric("mismatch/extreme_fraction")
_PR2_AVERAGES = {
    2: {"grpo": 44.6, "gspo": 45.9, "r2": 47.2, "r3": 56.5, "pr2": 55.6},
    4: {"grpo": 41.4, "gspo": 46.5, "r2": 43.8, "r3": 56.6, "pr2": 54.3},
    8: {"grpo": 41.3, "gspo": 43.8, "r2": 44.0, "pr2": 50.9},
}
"""By κ: average of AIME24 and 25 (avg@32), HMMT25, AMC23 (avg@16), MATH500 (avg@4), in percent."""


@dataclass(frozen=True)
class Beside:
    """One number of a paper, and the same of each group."""

    what: str
    source: str
    paper: str
    ours: tuple[str, ...]
    """For each group; a dash where the runs do not show it."""


def papers_beside(groups: Sequence[RunGroup]) -> list[Beside]:
    """The papers' numbers beside those of the groups."""

    def row(what: str, source: str, paper: str, ours: Callable[[RunGroup], str]) -> Beside:
        return Beside(what, source, paper, tuple(ours(group) for group in groups))

    return [
        row("KL(k3), no replay", _R3, "1.5e-3", lambda group: _one(group, "grpo", _KL, "scientific")),
        row("KL(k3), R3 over no replay", _R3, "about 0.5", lambda group: _ratio(group, "r3", "grpo", _KL)),
        row("KL(k3) of a dense model", "R3, dense 8B", "6.4e-4", lambda group: _ABSENT),
        row(
            "(token, layer) routed differently",
            _R3,
            "about 10 %",
            lambda group: _one(group, "grpo", metric("mismatch/router_fraction"), "percent"),
        ),
        row(
            "tokens routed differently somewhere",
            _R3,
            "94 %",
            lambda group: _one(group, "grpo", metric("mismatch/token_fraction"), "percent"),
        ),
        row("extreme tokens, R3 over no replay", _R3, "about 0.1", lambda group: _ratio(group, "r3", "grpo", _EXTREME)),
        row("time of a rollout, R3 over no replay", _R3, "below 1.03", _rollout_times),
        row("all experts unchanged: GRPO, PR2", _PR2, "76.9 %, 92.2 %", _unchanged),
        *(
            row(
                f"benchmarks at κ = {kappa}",
                _PR2,
                _averages(averages),
                lambda group, kappa=kappa: _scores(group, kappa),
            )
            for kappa, averages in _PR2_AVERAGES.items()
            if kappa in {group.mini_steps for group in groups}
        ),
    ]


def _mean(group: RunGroup, label: str, value: Value) -> float | None:
    values_SN = _values(group, label, value)
    return None if values_SN is None else float(values_SN.mean())


def _values(group: RunGroup, label: str, value: Value) -> np.ndarray | None:
    method = next((method for method in group.methods if method.label == label), None)
    return method and method.table(value).values()


def _one(group: RunGroup, label: str, value: Value, unit: Unit) -> str:
    mean = _mean(group, label, value)
    return _ABSENT if mean is None else shown(mean, unit)


def _ratio(group: RunGroup, label: str, baseline: str, value: Value) -> str:
    ours, theirs = _mean(group, label, value), _mean(group, baseline, value)
    if ours is None or theirs is None:
        return _ABSENT
    return f"{ours / theirs:.3g}" if theirs else ("none in either" if not ours else _ABSENT)


def _rollout_times(group: RunGroup) -> str:
    seconds = [_values(group, label, metric("time/rollout")) for label in ("r3", "grpo")]
    if any(values is None for values in seconds):
        return _ABSENT
    r3, grpo = (float(np.median(values)) for values in seconds if values is not None)
    return f"{r3 / grpo:.3g} (both capture)" if grpo else _ABSENT


def _unchanged(group: RunGroup) -> str:
    both = [_one(group, label, metric("routing/deviation_0"), "percent") for label in ("grpo", "pr2")]
    return _ABSENT if set(both) == {_ABSENT} else ", ".join(both)


def _averages(averages: dict[str, float]) -> str:
    return ", ".join(f"{label} {score:.1f}" for label, score in averages.items())


def _scores(group: RunGroup, kappa: int) -> str:
    """The last evaluation of each method, mean over benchmarks and seeds, in percent."""
    if group.mini_steps != kappa:
        return _ABSENT
    scores = {method.label: _last_score(method) for method in group.methods}
    return ", ".join(f"{label} {100 * score:.1f}" for label, score in scores.items() if score is not None) or _ABSENT


def _last_score(method: MethodRuns) -> float | None:
    table = method.table(_average_score).of_iterations(lambda iterations: iterations[-1:])
    values_SN = table.values()
    return None if values_SN is None else float(values_SN.mean())


def _average_score(metrics: Mapping[str, float]) -> float | None:
    scores = [score for key, score in metrics.items() if key.startswith("eval/") and key.endswith("/avg_at_n")]
    return sum(scores) / len(scores) if scores else None
