"""What runs are compared by: numbers of an iteration, and how they are summed up over a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from moe_replay.reports.bootstrap import Statistic
from moe_replay.reports.groups import Value

Unit = Literal["scientific", "percent", "points", "number", "seconds"]
"""`points` are differences of shares, told in percentage points."""
Window = Literal["all", "last third", "last"]

_TRAINING_STAGES = ("rollout", "routes", "training")


@dataclass(frozen=True)
class Measure:
    """One row of the comparison."""

    name: str
    value: Value
    statistic: Statistic
    unit: Unit
    better: Literal["lower", "higher"] | None
    window: Window = "all"
    is_gain: bool = False
    """Whether it is a difference in itself, judged against 0 and not against the baseline."""

    @property
    def title(self) -> str:
        """Name, window and statistic in words."""
        window = "" if self.window == "all" else f", {self.window}"
        return f"{self.name}{window}" + (f", {self.statistic}" if self.statistic != "mean" else "")

    def chosen(self, iterations: list[int]) -> list[int]:
        """The iterations of its window."""
        if self.window == "all":
            return iterations
        return iterations[-1:] if self.window == "last" else iterations[-max(1, -(-len(iterations) // 3)) :]


def measures_of(mini_steps: int, keys: set[str], one_step_off: bool) -> list[Measure]:
    """The rows for runs of κ `mini_steps` whose metrics have these keys.

    None of time where they are `one_step_off`: what stages take side by side adds up to more than an iteration.
    """
    kl = metric("mismatch/kl_k3")
    benchmarks = sorted(key for key in keys if key.startswith("eval/") and key.endswith("/avg_at_n"))
    return [
        Measure("mismatch KL(k3)", kl, "mean", "scientific", "lower"),
        Measure("mismatch KL(k3)", kl, "median", "scientific", "lower"),
        Measure("mismatch KL(k3)", kl, "p90", "scientific", "lower"),
        Measure("iterations with an extreme token", has_extreme_token, "mean", "percent", "lower"),
        Measure("routers that differ from the rollout's", metric("mismatch/router_fraction"), "mean", "percent", None),
        *(_agreement(step, mini_steps) for step in sorted({1, mini_steps})),
        Measure("coverage gap", metric("routing/coverage_gap"), "mean", "percent", "lower"),
        Measure("reward", metric("reward/mean"), "mean", "number", "higher", "last third"),
        *(
            Measure(f"avg@n of {key.split('/')[1]}", metric(key), "mean", "number", "higher", window)
            for key in benchmarks
            for window in ("last third", "last")
        ),
        Measure("predictor: iterations served by one", is_served, "mean", "percent", None),
        Measure("predictor: agreement gained", agreement_gain, "mean", "points", "higher", is_gain=True),
        Measure("predictor: KL saved", kl_saved, "mean", "percent", "higher", is_gain=True),
        *([] if one_step_off else [_time()]),
    ]


def metric(key: str) -> Value:
    """The metric of that key."""
    return lambda metrics: metrics.get(key)


def has_extreme_token(metrics: Mapping[str, float]) -> float | None:
    """1 where any response token's ratio passes 2, else 0."""
    share = metrics.get("mismatch/extreme_fraction")
    return None if share is None else float(share > 0)


def is_served(metrics: Mapping[str, float]) -> float | None:
    """1 where rollout or old log-prob pass was under a predictor not zero, else 0; None for methods without them."""
    if "predictor/kl_zero" not in metrics:
        return None
    return float("predictor/merge_fidelity" in metrics or metrics.get("predictor/layers_steered", 0) > 0)


def agreement_gain(metrics: Mapping[str, float]) -> float | None:
    """Held-out agreement of the predictor over that of the zero predictor."""
    return _of_two(metrics, "predictor/agreement", "predictor/agreement_zero", lambda ours, zero: ours - zero)


def kl_saved(metrics: Mapping[str, float]) -> float | None:
    """Share of the zero predictor's held-out KL that the predictor takes away."""
    return _of_two(metrics, "predictor/kl", "predictor/kl_zero", lambda ours, zero: 1 - ours / zero if zero else 0.0)


def training_seconds(metrics: Mapping[str, float]) -> float | None:
    """Seconds of rollout, archiving, training and, where there is one, the fit; None while any time is unknown."""
    times = [metrics.get(f"time/{stage}") for stage in _TRAINING_STAGES]
    known = [time for time in times if time is not None]
    return sum(known) + metrics.get("time/predictor", 0.0) if len(known) == len(times) else None


def shown(value: float, unit: Unit, signed: bool = False) -> str:
    """A number as people read it in tables."""
    sign = "+" if signed else ""
    match unit:
        case "scientific":
            return f"{value:{sign}.2e}" if value else "0"
        case "percent":
            return f"{100 * value:{sign}.2f} pp" if signed else f"{100 * value:.2f} %"
        case "points":
            return f"{100 * value:+.3f} pp"
        case "seconds":
            return f"{value:{sign}.2f} s"
        case "number":
            return f"{value:{sign}.3f}"


def _time() -> Measure:
    return Measure("time of an iteration, evaluation aside", training_seconds, "median", "seconds", "lower")


def _agreement(step: int, mini_steps: int) -> Measure:
    name = f"agreement at mini-step {step} of {mini_steps}"
    return Measure(name, metric(f"routing/agreement_step_{step}"), "mean", "percent", "higher")


def _of_two(
    metrics: Mapping[str, float], ours: str, zero: str, combined: Callable[[float, float], float]
) -> float | None:
    return combined(metrics[ours], metrics[zero]) if ours in metrics and zero in metrics else None
