"""Runs that may be compared: the same model, data and settings, but for method, seed and κ.

Legend: S seeds (runs of one method), N iterations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_replay.alarm import ALARM_METRIC
from moe_replay.dotted import dotted
from moe_replay.errors import ConfigError
from moe_replay.reports.runs import RunResults, one_line

Value = Callable[[Mapping[str, float]], float | None]
"""A number from an iteration's metrics; None where they lack it."""

_COMPARED = ("seed", "training.mini_steps", "method.")
_NO_PART_OF_RESULTS = (
    "iterations",
    "storage.",
    "resources.",
    "stages.",
    "tracking.",
    "alarm.",
    "model.path",
    "data.train",
)
"""Paths among them: what lies there is compared by checksum. Of the alarm decisions count, and notes tell of those."""
_BENCHMARK_FILES = "evaluation.benchmarks."
_OF_PREDICTORS = ("predictor.", "evolution.")
_VARIANTS = (*_OF_PREDICTORS, "rollout.gate_dtype", "rollout.one_step_off")
"""Settings that are part of how a method is done, so that runs which differ in them are told apart and compared."""
_SHOWN = 8


@dataclass(frozen=True)
class MethodRuns:
    """Runs of one method under different seeds."""

    label: str
    runs: tuple[RunResults, ...]
    """By ascending seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the runs, in order."""
        return tuple(run.seed for run in self.runs)

    def table(self, value: Value) -> "SeedTable":
        """A number of each run and iteration."""
        return SeedTable({run.seed: _numbers(run, value) for run in self.runs})


@dataclass(frozen=True)
class SeedTable:
    """A number by seed and iteration, of one method; those that are missing are not in it."""

    numbers: dict[int, dict[int, float]]

    def values(self) -> np.ndarray | None:
        """Float64 [S, N], over the seeds that have any and the iterations that all of these have; None without any."""
        return _rectangle([numbers for numbers in self.numbers.values() if numbers])

    def beside(self, other: "SeedTable") -> tuple[np.ndarray, np.ndarray] | None:
        """The values of both where both have them, float64 [S, N] each; None where they share no seed or iteration."""
        seeds = [seed for seed, numbers in self.numbers.items() if numbers and other.numbers.get(seed)]
        joined = _rectangle([table.numbers[seed] for table in (self, other) for seed in seeds])
        return None if joined is None else (joined[: len(seeds)], joined[len(seeds) :])

    def of_iterations(self, chosen: Callable[[list[int]], list[int]]) -> "SeedTable":
        """Only the iterations that `chosen` takes of those that any seed has, ascending."""
        kept = set(chosen(sorted({iteration for numbers in self.numbers.values() for iteration in numbers})))
        return SeedTable(
            {seed: {n: x for n, x in numbers.items() if n in kept} for seed, numbers in self.numbers.items()}
        )


@dataclass(frozen=True)
class RunGroup:
    """The runs of one κ, all cut to the iterations that every one of them completed."""

    mini_steps: int
    """κ."""
    model: str
    iterations: tuple[int, ...]
    methods: tuple[MethodRuns, ...]
    """In the order in which their first runs were named."""
    notes: tuple[str, ...]
    """What was left out, in sentences."""

    @property
    def runs(self) -> list[RunResults]:
        """All runs."""
        return [run for method in self.methods for run in method.runs]

    @property
    def labels(self) -> list[str]:
        """Of the methods, in order."""
        return [method.label for method in self.methods]

    @property
    def one_step_off(self) -> bool:
        """Whether stages overlapped, so that the time of an iteration is not their sum."""
        return any(_is_one_step_off(run) for run in self.runs)


def group_runs(runs: Sequence[RunResults]) -> list[RunGroup]:
    """Groups of comparable runs, by ascending κ.

    Raises ConfigError when runs differ in model, data or any setting that is not compared, when two are of one method
    and seed, and when no iteration is common to all of a κ.
    """
    if not runs:
        raise ConfigError("there is no run to compare; name at least one")
    for run in runs[1:]:
        _require_same_sources(runs[0], run)
    by_kappa: dict[int, list[RunResults]] = {}
    for run in runs:
        by_kappa.setdefault(run.mini_steps, []).append(run)
    return [_group(by_kappa[kappa]) for kappa in sorted(by_kappa)]


def _group(runs: list[RunResults]) -> RunGroup:
    for run in runs[1:]:
        _require_same_settings(runs[0], run)
    common = set.intersection(*({part.iteration for part in run.iterations} for run in runs))
    if not common:
        told = ", ".join(f"{run.run_id} has {_span(_iterations(run))}" for run in runs[:_SHOWN])
        raise ConfigError(
            f"no iteration was completed by all {len(runs)} runs of κ = {runs[0].mini_steps}: {told}; leave out the "
            "runs that lack them"
        )
    methods: dict[str, list[RunResults]] = {}
    for run, label in zip(runs, _labels(runs), strict=True):
        same = methods.setdefault(label, [])
        if twin := next((other for other in same if other.seed == run.seed), None):
            raise ConfigError(
                f"runs {twin.run_id} and {run.run_id} are both {label} with seed {run.seed} at κ = {run.mini_steps}, "
                "which would count once and be shown as two; leave one out"
            )
        same.append(run)
    return RunGroup(
        mini_steps=runs[0].mini_steps,
        model=runs[0].model,
        iterations=tuple(sorted(common)),
        methods=tuple(
            MethodRuns(label, tuple(run.only(common) for run in sorted(same, key=lambda run: run.seed)))
            for label, same in methods.items()
        ),
        notes=tuple([note for run in runs for note in _notes(run, common)] + _notes_of_all(runs)),
    )


def _notes_of_all(runs: list[RunResults]) -> list[str]:
    if not any(map(_is_one_step_off, runs)):
        return []
    return [
        "Rollouts worked beside training (rollout.one_step_off), so an iteration takes less than its stages together: "
        "its time is left out."
    ]


def _is_one_step_off(run: RunResults) -> bool:
    # Runs of older versions have no such setting.
    return bool(run.config.get("rollout", {}).get("one_step_off"))


def _notes(run: RunResults, common: set[int]) -> list[str]:
    notes = []
    if run.incomplete:
        notes.append(f"Run {run.run_id}: {_span(run.incomplete)} left out, not completed.")
    if longer := [number for number in _iterations(run) if number not in common]:
        notes.append(f"Run {run.run_id}: {_span(longer)} left out, which not all runs completed.")
    if alarms := [part.iteration for part in run.iterations if ALARM_METRIC in part.metrics]:
        notes.append(
            f"Run {run.run_id}: the stability alarm was raised in {_span(alarms)}, whose batches were trained on, or "
            "not, as was decided."
        )
    if lacking := [number for number in run.without_routing if number in common]:
        notes.append(
            f"Run {run.run_id}: statistics by layer of {_span(lacking)} are not stored (removed by retention, or "
            "written by an older version); figures that need them lack them, the table does not."
        )
    return notes


def _labels(runs: list[RunResults]) -> list[str]:
    """The method of each run, followed by the variants in which it differs from the first run that has them."""
    first: dict[str, Any] = {}
    labels = []
    for run in runs:
        settings = {"rollout.one_step_off": False} | dotted(run.config)
        predicts = bool(settings.get("method.predictor"))
        variants = {
            key: value
            for key, value in settings.items()
            if key.startswith(_VARIANTS) and (predicts or not key.startswith(_OF_PREDICTORS))
        }
        differing = [f"{key}={value}" for key, value in variants.items() if first.setdefault(key, value) != value]
        labels.append(one_line(" ".join([run.method, *differing])))
    return labels


def _require_same_sources(one: RunResults, other: RunResults) -> None:
    names = one.sources.keys() | other.sources.keys()
    differing = sorted(name for name in names if one.sources.get(name) != other.sources.get(name))
    if differing:
        raise ConfigError(
            f"runs {one.run_id} and {other.run_id} can't be compared: {', '.join(differing[:_SHOWN])} differ by "
            "checksum; compare runs of one model and the same data, others in a report of their own"
        )


def _require_same_settings(one: RunResults, other: RunResults) -> None:
    free = (*_COMPARED, *_NO_PART_OF_RESULTS, *_VARIANTS, _BENCHMARK_FILES)
    a, b = _settings(one.config), _settings(other.config)
    # A setting that one lacks is younger than that run, which was made under its default.
    keys = [key for key in a if key in b and a[key] != b[key] and not key.startswith(free)]
    if keys:
        told = ", ".join(f"{key} ({a[key]!r} and {b[key]!r})" for key in keys[:_SHOWN])
        raise ConfigError(
            f"runs {one.run_id} and {other.run_id} can't be compared: {told} differ; runs of one κ may differ in "
            "method, seed, rollout.one_step_off and the settings of predictors alone"
        )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted, with the n of avg@n of each benchmark, whether it has its own or not."""
    evaluation = config.get("evaluation", {})
    own = evaluation.get("samples_of", {})
    samples = {name: own.get(name, evaluation.get("samples")) for name in evaluation.get("benchmarks", {})}
    settings = dotted(config) | dotted({"evaluation": {"samples_of": samples}})
    return {key: value for key, value in settings.items() if key != "evaluation.samples"}


def _numbers(run: RunResults, value: Value) -> dict[int, float]:
    found = {part.iteration: value(part.metrics) for part in run.iterations}
    return {iteration: number for iteration, number in found.items() if number is not None}


def _rectangle(rows: list[dict[int, float]]) -> np.ndarray | None:
    common = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
    return np.array([[row[iteration] for iteration in common] for row in rows]) if common else None


def _iterations(run: RunResults) -> list[int]:
    return [part.iteration for part in run.iterations]


def _span(iterations: Sequence[int]) -> str:
    """Iterations in words: `iteration 3`, `iterations 3 to 9`, `iterations 1, 4, 5`."""
    if len(iterations) == 1:
        return f"iteration {iterations[0]}"
    if list(iterations) == list(range(iterations[0], iterations[-1] + 1)):
        return f"iterations {iterations[0]} to {iterations[-1]}"
    return f"iterations {', '.join(map(str, iterations))}"
