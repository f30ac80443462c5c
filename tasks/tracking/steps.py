"""Runs in MLflow: one MLflow run for one training run, one step for one iteration.

Everything logged is read from committed artifacts, each step in one batch and under the time of its commits, so that a
resumed run finds what is there and adds only what is missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from moe_replay.alarm import ALARM_METRIC
from moe_replay.config import RunConfig
from moe_replay.errors import TrackingUnavailable
from moe_replay.evaluations import Evaluation
from moe_replay.holding import require_lease
from moe_replay.places import home_folder
from moe_replay.reports.results import iteration_metrics
from moe_replay.stages.decisions import actions_in
from moe_replay.stages.run import Run
from tasks.retry import is_transient
from tasks.tracking.identity import (
    COMPARISON,
    ITERATIONS,
    RUN_KEY,
    close_earlier,
    create_run,
    find_run,
    iterations_logged,
    key_of,
    log_settings,
    tell_attempt,
)
from tasks.tracking.lineage import dataset_digest, log_checkpoint, log_data
from tasks.tracking.server import client_of, errors_translated, experiment_of, tracking_uri

EVALUATION_OF = "moe_replay.evaluation_of"
"""Tag of an evaluation's MLflow run: the training run, or the model, that it is of."""
_REPORT_OF = "moe_replay.report_of"
_EVALUATION = "eval/"
_DECISIONS = "alarm.decisions"
_RETRIED: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": 2,
    "retry_condition_fn": is_transient,
}
"""Options of the tasks that ask MLflow."""


@task(name="open tracking", **_RETRIED)
@errors_translated()
def open_tracking(run: Run) -> str:
    """The id of the training run's MLflow run, which is created the first time and continued after."""
    client = client_of(run.home)
    experiment_id = experiment_of(client, run.config, run.home)
    tracked = find_run(client, experiment_id, run) or create_run(client, experiment_id, run)
    run_id = tracked.info.run_id
    try:
        client.update_run(run_id, status="RUNNING")
        tell_attempt(client, tracked, run)
        log_data(client, run, run_id)
        log_settings(client, tracked, run.config)
        close_earlier(client, experiment_id, run, run_id)
    except BaseException:
        # Nobody closes what was not opened.
        with suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise
    return run_id


@task(name="track", task_run_name="track-{iteration}", **_RETRIED)
@errors_translated()
def track_iteration(run: Run, mlflow_run_id: str, iteration: int) -> dict[str, float]:
    """Log an iteration's metrics as one step, unless they are there already, and return them."""
    from mlflow.entities import RunTag

    metrics = iteration_metrics(run.store(), iteration)
    client = client_of(run.home)
    tracked = client.get_run(mlflow_run_id)
    logged = iterations_logged(tracked)
    evaluated = any(name.startswith(_EVALUATION) for name in metrics)
    model_id = log_checkpoint(client, run, tracked, iteration) if evaluated and iteration >= logged - 1 else None
    points = _points(run, iteration, metrics, model_id)
    if iteration >= logged:
        tags = [RunTag(ITERATIONS, str(iteration + 1)), *_decision_tags(run, iteration, metrics, tracked)]
        # Else what another runner logged meanwhile would be there twice.
        require_lease(run.store())
        client.log_batch(mlflow_run_id, metrics=points, tags=tags)
    elif iteration == logged - 1:
        # Where fewer iterations are asked for than at first, the last is evaluated after it was logged.
        late = [point for point in points if point.key.startswith(_EVALUATION)]
        client.log_batch(mlflow_run_id, metrics=[one for one in late if not _is_logged(client, mlflow_run_id, one)])
    return metrics


def _decision_tags(run: Run, iteration: int, metrics: dict[str, float], tracked: Any) -> list[Any]:
    """What was decided on the stability alarm so far, with this iteration's; nothing where this one raised none."""
    from mlflow.entities import RunTag

    training = run.store().committed("training", iteration) if ALARM_METRIC in metrics else None
    if training is None:
        return []
    told = [tracked.data.tags.get(_DECISIONS), f"{iteration}: {', '.join(actions_in(training))}"]
    return [RunTag(_DECISIONS, "; ".join(filter(None, told)))]


@task(name="track evaluation", **_RETRIED)
@errors_translated()
def track_evaluation(evaluation: Evaluation) -> str:
    """Log an evaluation's scores as a step of its own MLflow run, unless they are there; returns that run's id.

    The MLflow run is one for all checkpoints of an evaluation, and tagged with the training run that it is of.
    """
    from mlflow.entities import Metric
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    run, iteration = evaluation.run, evaluation.iteration
    client = client_of(run.home)
    experiment_id = experiment_of(client, run.config, run.home)
    if found := find_run(client, experiment_id, run):
        run_id = found.info.run_id
    else:
        note = f"Scores of `{evaluation.subject}`, under `{run.store().name}`; a step is an iteration of that run."
        tags = {RUN_KEY: key_of(run), EVALUATION_OF: evaluation.subject, MLFLOW_RUN_NOTE: note}
        run_id = client.create_run(experiment_id, run_name=run.run_id, tags=tags).info.run_id
    metrics, moment = iteration_metrics(run.store(), iteration), _milliseconds(run, iteration)
    logged = {name: client.get_metric_history(run_id, name) for name in metrics}
    missing = {n: v for n, v in metrics.items() if iteration not in {point.step for point in logged[n]}}
    points = [Metric(name, value, moment, iteration) for name, value in sorted(missing.items())]
    require_lease(run.store())
    client.log_batch(run_id, metrics=points)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def finished_run(run: Run) -> str | None:
    """The id of the training run's MLflow run where that was closed with every iteration; none also without MLflow."""
    try:
        with errors_translated():
            client = client_of(run.home)
            experiment = client.get_experiment_by_name(run.config.tracking.experiment)
            found = find_run(client, experiment.experiment_id, run) if experiment else None
    except TrackingUnavailable:
        return None
    done = found and found.info.status == "FINISHED" and iterations_logged(found) >= run.config.iterations
    return found.info.run_id if found and done else None


@contextmanager
def recording_system_metrics(run: Run, mlflow_run_id: str) -> Iterator[None]:
    """Have MLflow sample the machine (`system/...`) until the block ends; what fails is only logged.

    MLflow's own variables tell how often, and MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false that it shall not.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        yield
        return
    monitor = SystemMetricsMonitor(mlflow_run_id, resume_logging=True, tracking_uri=tracking_uri(run.home))
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


@errors_translated()
def file_figures(run: Run, mlflow_run_id: str, folder: Path) -> None:
    """File what lies in `folder` with the run, in the place of earlier files of these names."""
    client_of(run.home).log_artifacts(mlflow_run_id, str(folder), "figures")


@errors_translated()
def file_report(config: RunConfig, comparison: str, folder: Path) -> None:
    """File a comparison's report as an MLflow run of its own, which carries the tag of the runs that it compares."""
    client = client_of(home_folder())
    experiment_id = experiment_of(client, config, home_folder())
    wanted = f"tags.`{_REPORT_OF}` = '{comparison}'"
    found = client.search_runs([experiment_id], wanted, max_results=1)
    tags = {COMPARISON: comparison, _REPORT_OF: comparison}
    run_id = found[0].info.run_id if found else client.create_run(experiment_id, None, tags, comparison).info.run_id
    client.log_artifacts(run_id, str(folder))
    client.set_terminated(run_id, "FINISHED")


@task(name="close tracking", cache_policy=NO_CACHE)
def close_tracking(run: Run, mlflow_run_id: str, succeeded: bool) -> None:
    """Mark the MLflow run finished or failed; what MLflow raises is only logged, the run itself has ended.

    It stays as it is where another runner took the run over.
    """
    try:
        require_lease(run.store())
        client_of(run.home).set_terminated(mlflow_run_id, "FINISHED" if succeeded else "FAILED")
    except Exception as error:
        get_run_logger().warning("MLflow run %s could not be closed (%s)", mlflow_run_id, type(error).__name__)


def _points(run: Run, iteration: int, metrics: dict[str, float], model_id: str | None) -> list[Any]:
    """An iteration's metrics as MLflow has them; those of evaluation belong to the checkpoint and the benchmark too."""
    from mlflow.entities import Metric

    moment = _milliseconds(run, iteration)

    def about(name: str) -> dict[str, str | None]:
        benchmark = name.split("/")[1] if name.startswith(_EVALUATION) else None
        if benchmark not in run.benchmarks:
            return {}
        return {
            "model_id": model_id,
            "dataset_name": benchmark,
            "dataset_digest": dataset_digest(run.benchmarks[benchmark]),
        }

    return [Metric(name, value, moment, iteration, **about(name)) for name, value in sorted(metrics.items())]


def _milliseconds(run: Run, iteration: int) -> int:
    """When the iteration's last stage was committed: the same however often the step is logged."""
    finished = [status.finished for status in run.store().status(iteration) if status.finished is not None]
    return int(max(finished).timestamp() * 1000) if finished else 0


def _is_logged(client: Any, run_id: str, point: Any) -> bool:
    return any(logged.step == point.step for logged in client.get_metric_history(run_id, point.key))
