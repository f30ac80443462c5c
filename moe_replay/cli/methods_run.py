"""Training methods by seeds for `moe-replay compare`: the comparison flow in this process, under a progress bar."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_replay.cli.console import err
from moe_replay.config import RunConfig
from moe_replay.design import runs_of
from moe_replay.environment import make_home
from moe_replay.interrupts import interruptible
from moe_replay.methods import Method

if TYPE_CHECKING:
    from flows.compare import Compared


def train_methods(
    config: RunConfig,
    methods: Sequence[Method],
    seeds: Sequence[int],
    comparison: str,
    baseline: str | None,
    console: Console,
    go_on: str,
) -> "Compared":
    """Train every method from every seed, or go on with it; `go_on` is the command that does after an interrupt.

    Raises ConfigError before anything is started when any of the runs could not be.
    """
    from moe_replay.preparation import preflight

    # Before Prefect is imported: that takes seconds, and wants to make its home.
    runs = list(runs_of(config, methods, seeds, comparison))
    for run_id, settings in runs:
        preflight(settings, run_id)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from moe_replay.servers import prefect_server

    console.print(f"comparison {comparison}: {len(runs)} runs", highlight=False, markup=False)
    try:
        with interruptible(), prefect_server(make_home()) as wait_for_prefect:
            from flows.compare import compare
            from tasks.progress import listening
            from tasks.reporting import flush_logs, hearing_results

            display = _ComparisonDisplay(console, [run_id for run_id, _ in runs], config.iterations)
            with display, listening(display.on_progress), hearing_results(display.on_result):
                wait_for_prefect()
                try:
                    return compare(config, list(methods), list(seeds), comparison, baseline)
                finally:
                    flush_logs()
    except KeyboardInterrupt:
        err.print(f"stopped; what is committed stays: {go_on}", highlight=False, markup=False, soft_wrap=True)
        raise


class _ComparisonDisplay:
    """A bar over all iterations of all runs; where nobody watches, a line a run."""

    def __init__(self, console: Console, run_ids: list[str], iterations: int):
        self._console, self._run_ids, self._iterations = console, run_ids, iterations
        self._present = run_ids[0]
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        told = TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, told, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=len(run_ids) * iterations)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def on_progress(self, stage: str, done: int, total: int, what: str) -> None:
        """Show what the present run is at."""
        at = f"{done} of {total} {what}" if total else what
        self._bar.update(self._task, description=f"{self._present}: {stage}: {at}")

    def on_result(self, run_id: str, iteration: int, _metrics: dict[str, float]) -> None:
        """Move to the end of an iteration of a run."""
        place = self._run_ids.index(run_id)
        self._bar.update(self._task, completed=place * self._iterations + iteration + 1)
        is_last = iteration == self._iterations - 1
        self._present = self._run_ids[min(place + is_last, len(self._run_ids) - 1)]
        if is_last and not self._console.is_terminal:
            self._console.print(f"{place + 1} of {len(self._run_ids)} runs: {run_id}", highlight=False)
