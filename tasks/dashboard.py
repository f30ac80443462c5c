"""A run's figures, drawn beside the training and filed in MLflow: the dashboard, and the maps and table by layer."""

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from moe_replay.reports.runs import RunReader
from moe_replay.stages.run import Run
from tasks.tracking.steps import file_figures

if TYPE_CHECKING:
    from moe_replay.reports.predictor_report import PredictorReport

REFRESH_SECONDS = 30.0
"""Figures are drawn anew at most that often while a run works, and once more when it ends."""

DASHBOARD, LAYERS, LAYER_TABLE = "dashboard.png", "layers.png", "layers.csv"
PREDICTOR_REPORT, PREDICTOR = "predictor.json", "predictor.png"


@contextmanager
def refreshing_dashboard(run: Run, mlflow_run_id: str) -> Iterator[Callable[[int], None]]:
    """Draw when the yielded function is called with an iteration that ended, not holding up the next, and at the end.

    One drawing at a time; what fails is only logged.
    """
    reader = RunReader(run.store())
    drawn: Event | None = None
    # A run that is over in less is drawn once.
    due = time.monotonic() + REFRESH_SECONDS
    fresh = True

    def refresh(iteration: int) -> None:
        nonlocal drawn, due, fresh
        fresh = time.monotonic() >= due and (drawn is None or drawn.is_set())
        if fresh:
            due = time.monotonic() + REFRESH_SECONDS
            drawn = _start_drawing(run, mlflow_run_id, reader, iteration)
            fresh = drawn is not None

    yield refresh
    # Not when the run failed or was interrupted: then nobody should wait for a figure.
    if drawn is not None:
        drawn.wait()
    if not fresh:
        with _failures_logged():
            draw_dashboard(run, mlflow_run_id, reader, run.plan.iterations.stop)


def _start_drawing(run: Run, mlflow_run_id: str, reader: RunReader, settled: int) -> Event | None:
    """Draw in another thread; what is set when that ends, None where it could not be started."""
    # To ask Prefect for the state of a task is a request to its server, which may fail.
    drawn = Event()
    with _failures_logged():
        draw_dashboard.submit(run, mlflow_run_id, reader, settled).add_done_callback(lambda _: drawn.set())
        return drawn
    return None


@task(name="dashboard", cache_policy=NO_CACHE)
def draw_dashboard(run: Run, mlflow_run_id: str, reader: RunReader, settled: int) -> None:
    """Draw what the run has achieved and file it in MLflow; a figure that fails is only logged, training goes on.

    Iterations below `settled` are read once.
    """
    from moe_replay.reports.dashboard import draw_dashboard as draw
    from moe_replay.reports.layers import draw_layers, layer_table
    from moe_replay.reports.predictor_report import read_report

    with _failures_logged(), run.scratch() as folder:
        results = reader.read(extremes=False, settled=settled)
        draw(results, folder / DASHBOARD)
        if results.iterations[-1].routing is not None:
            draw_layers(results, folder / LAYERS)
        by_layer = {part.iteration: layer_table(part.routing) for part in results.iterations if part.routing}
        _write_table(
            [{"iteration": iteration, **row} for iteration, rows in by_layer.items() for row in rows],
            folder / LAYER_TABLE,
        )
        if run.config.method.predictor and "predictor/layers_used" in results.iterations[-1].metrics:
            _write_predictor(read_report(run.store(), results.iterations[-1].iteration), folder)
        file_figures(run, mlflow_run_id, folder)


@contextmanager
def _failures_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        get_run_logger().warning("the dashboard could not be drawn (%s: %s)", type(error).__name__, error)


def _write_predictor(report: "PredictorReport", folder: Path) -> None:
    """The newest fit: its report, and a figure where something was judged."""
    from moe_replay.reports.predictor_figure import draw_predictor

    (folder / PREDICTOR_REPORT).write_text(report.model_dump_json(indent=2))
    if report.layers[0].judged.factors:
        draw_predictor(report, folder / PREDICTOR)


def _write_table(rows: list[dict[str, float | int]], path: Path) -> None:
    with path.open("w", newline="") as stream:
        # An iteration may lack a column that others have.
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
