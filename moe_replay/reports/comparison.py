"""The comparison of methods as a document: every measure with its interval, every method against a baseline."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moe_replay.errors import ConfigError
from moe_replay.reports.bootstrap import CONFIDENCE, RESAMPLES, Estimate, estimate, paired_difference
from moe_replay.reports.groups import MethodRuns, RunGroup
from moe_replay.reports.measures import Measure, Unit, measures_of

DEFAULT_BASELINE = "grpo"

Verdict = Literal["lower", "higher", "within noise", "too few values"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Number(_Record):
    """A number and how sure it is."""

    value: float
    interval: tuple[float, float] | None
    """Bootstrap, 95 %; None where there are too few values."""
    seeds: int
    iterations: int
    """Of each seed."""

    @classmethod
    def of(cls, found: Estimate) -> "Number":
        """The estimate as a record."""
        return cls(value=found.value, interval=found.interval, seeds=found.seeds, iterations=found.iterations)


class Cell(_Record):
    """One method under one measure."""

    method: str
    number: Number | None
    """None where the method has no such metric."""
    difference: Number | None
    """Over the baseline, on the seeds and iterations that both have; of a gain, over 0. None for the baseline."""
    verdict: Verdict | None
    """What the difference amounts to."""


class Row(_Record):
    """One measure."""

    measure: str
    unit: Unit
    better: Literal["lower", "higher"] | None
    cells: tuple[Cell, ...]


class ComparedRun(_Record):
    """One run of a method."""

    run_id: str
    seed: int


class ComparedMethod(_Record):
    """A method and the runs of it."""

    method: str
    runs: tuple[ComparedRun, ...]


class GroupComparison(_Record):
    """The methods at one κ."""

    mini_steps: int
    model: str
    baseline: str
    iterations: tuple[int, ...]
    """Iterations that all runs completed."""
    methods: tuple[ComparedMethod, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def tested(self) -> int:
        """Differences that were judged."""
        return sum(cell.verdict is not None for row in self.rows for cell in row.cells)


class MethodComparison(_Record):
    """Methods compared, by κ."""

    confidence: float
    resamples: int
    groups: tuple[GroupComparison, ...]


def compare_methods(groups: Sequence[RunGroup], baseline: str | None = None) -> MethodComparison:
    """Compare the methods of each group against `baseline`, by default grpo where it is there, else the first.

    Raises ConfigError when a group has no method of that label.
    """
    compared = tuple(_compare(group, _baseline(group, baseline)) for group in groups)
    return MethodComparison(confidence=CONFIDENCE, resamples=RESAMPLES, groups=compared)


def _baseline(group: RunGroup, wanted: str | None) -> MethodRuns:
    by_label = {method.label: method for method in group.methods}
    if wanted is not None and wanted not in by_label:
        raise ConfigError(
            f"no run at κ = {group.mini_steps} is of the baseline {wanted!r}; the methods there are "
            f"{', '.join(by_label)}: name one of them, or add runs"
        )
    return by_label.get(wanted or DEFAULT_BASELINE, group.methods[0])


def _compare(group: RunGroup, baseline: MethodRuns) -> GroupComparison:
    keys = {key for run in group.runs for part in run.iterations for key in part.metrics}
    measures = measures_of(group.mini_steps, keys, group.one_step_off)
    rows = [_row(measure, group, baseline) for measure in measures]
    return GroupComparison(
        mini_steps=group.mini_steps,
        model=group.model,
        baseline=baseline.label,
        iterations=group.iterations,
        methods=tuple(
            ComparedMethod(
                method=method.label,
                runs=tuple(ComparedRun(run_id=run.run_id, seed=run.seed) for run in method.runs),
            )
            for method in group.methods
        ),
        rows=tuple(row for row in rows if any(cell.number for cell in row.cells)),
        notes=group.notes,
    )


def _row(measure: Measure, group: RunGroup, baseline: MethodRuns) -> Row:
    cells = tuple(_cell(measure, method, baseline) for method in group.methods)
    return Row(measure=measure.title, unit=measure.unit, better=measure.better, cells=cells)


def _cell(measure: Measure, method: MethodRuns, baseline: MethodRuns) -> Cell:
    table = method.table(measure.value).of_iterations(measure.chosen)
    values_SN = table.values()
    if values_SN is None:
        return Cell(method=method.label, number=None, difference=None, verdict=None)
    found = estimate(values_SN, measure.statistic)
    difference = None
    if measure.is_gain:
        difference = found
    elif method is not baseline:
        pair = table.beside(baseline.table(measure.value).of_iterations(measure.chosen))
        difference = pair and paired_difference(*pair, measure.statistic)
    return Cell(
        method=method.label,
        number=Number.of(found),
        difference=Number.of(difference) if difference else None,
        verdict=difference.verdict if difference else None,
    )
