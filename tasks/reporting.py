"""Results as they come: to whoever listens in this process, to the log, and as a table to the Prefect UI."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging.handlers import APILogHandler

from moe_replay.stages.run import Run
from tasks.progress import artifact_key

ResultListener = Callable[[str, int, dict[str, float]], None]
"""Called with (run id, iteration, its metrics)."""
HEADLINES = ("reward/mean", "mismatch/kl_k3", "mismatch/extreme_fraction", "routing/agreement")
"""The metrics that tell at a glance how a run fares; evaluation's are added."""

_listeners: list[ResultListener] = []


@contextmanager
def hearing_results(listener: ResultListener) -> Iterator[None]:
    """Have `listener` told of each iteration that ends in this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def headlines(metrics: dict[str, float]) -> dict[str, float]:
    """What a table shows of an iteration."""
    names = [*HEADLINES, *sorted(name for name in metrics if name.startswith("eval/"))]
    return {name: metrics[name] for name in names if name in metrics}


@task(name="report", cache_policy=NO_CACHE)
def report_results(run: Run, results: dict[int, dict[str, float]]) -> None:
    """Tell listeners and the log of the newest iteration, and refresh the run's table in the Prefect UI."""
    newest = max(results)
    for listener in _listeners:
        listener(run.run_id, newest, results[newest])
    told = ", ".join(f"{name} {value:.4g}" for name, value in headlines(results[newest]).items())
    get_run_logger().info("iteration %d: %s", newest, told)
    rows = [{"iteration": n, **headlines(result)} for n, result in results.items()]
    description = f"Run `{run.run_id}`, method {run.config.method.label}"
    try:
        create_table_artifact(table=rows, key=artifact_key("results", run.run_id), description=description)
    except Exception as error:
        get_run_logger().warning("the table of results could not be refreshed (%s)", type(error).__name__)


def flush_logs() -> None:
    """Hand what was logged to Prefect's server, as long as there is one; it is sent every other second otherwise."""
    APILogHandler().flush()
