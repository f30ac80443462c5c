"""The comparison: methods by seeds on the same problems, initial weights and sampling seeds, then one report."""

from typing import NamedTuple

from prefect import flow, get_run_logger

from flows.train import train
from moe_replay.config import RunConfig
from moe_replay.design import runs_of
from moe_replay.interrupts import interrupts_kept
from moe_replay.methods import PRESETS, Method
from tasks.comparison import report_comparison
from tasks.engines import keeping_engines
from tasks.failures import LOGGED_FAILURES
from tasks.naming import comparison_name, own_comparison


class Compared(NamedTuple):
    """What came of a comparison."""

    runs: list[str]
    """Ids of the runs that the report is of."""
    failed: list[str]
    """Ids of those that failed; their logs and statuses say where."""
    report: str
    """The report's folder; empty when every run failed."""


@flow(name="compare", flow_run_name=comparison_name, persist_result=False, **LOGGED_FAILURES)
def compare(
    config: RunConfig = RunConfig(),  # noqa: B008 (frozen)
    methods: list[Method] = [Method.model_validate(name) for name in PRESETS],  # noqa: B006, B008 (never changed)
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (never changed)
    comparison: str | None = None,
    baseline: str | None = None,
) -> Compared:
    """Train with every method from every seed, and report how they differ and by how much more than noise.

    A run that fails is told of and left out of the report.

    Args:
        config: Settings of all runs; method and seed are replaced.
        methods: Names of presets, or tables.
        seeds: Each method is trained from each of them.
        comparison: Name of the comparison; the same continues one that was stopped.
        baseline: The method that others are held against; by default grpo where it is there, else the first.
    """
    name = own_comparison()
    done, failed = [], []
    with keeping_engines():
        # All at once, so that an id which can't be is refused before the first is trained.
        for run_id, settings in list(runs_of(config, methods, seeds, name)):
            try:
                with interrupts_kept():
                    train(settings, run_id)
                done.append(run_id)
            except Exception as error:
                get_run_logger().error("run %s failed: %s: %s", run_id, type(error).__name__, error)
                failed.append(run_id)
    return Compared(done, failed, report_comparison(config, name, done, baseline) if done else "")
