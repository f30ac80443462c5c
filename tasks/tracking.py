"""Runs in MLflow: one MLflow run for one training run, one step for one iteration. The only file that imports MLflow.

Everything logged is read from committed artifacts, each step in one batch and under the time of its commits, so that a
resumed run finds what is there and adds only what is missing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from moe_replay.alarm import ALARM_METRIC
from moe_replay.config import RunConfig, home_folder
from moe_replay.dotted import dotted
from moe_replay.errors import TrackingUnavailable
from moe_replay.preparation import package_versions
from moe_replay.reports.results import iteration_metrics
from moe_replay.stages.decisions import actions_in
from moe_replay.stages.run import Run
from tasks.retry import is_transient

RUN_KEY = "moe_replay.run"
"""Tag by which a training run finds its MLflow run again."""
_REPORT_OF = "moe_replay.report_of"
COMPARISON = "comparison"
"""Tag that the runs of one comparison share."""
_ITERATIONS = "moe_replay.iterations_logged"
_DECISIONS = "alarm.decisions"
_SETTINGS_LOGGED = "moe_replay.settings_logged"
_PERMANENT = {"INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST"}
_SHOWN_AS_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's UI open the experiment with charts of training runs, not with those of language model applications."""


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what MLflow and its database raise as TrackingUnavailable where another attempt may succeed."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (RequestException, OperationalError) as error:
        raise TrackingUnavailable(f"MLflow did not answer ({type(error).__name__}); try again") from error
    except MlflowException as error:
        if error.error_code in _PERMANENT:
            raise
        raise TrackingUnavailable(f"MLflow could not serve the request ({error.error_code}); try again") from error


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, by default a database under `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"


@task(name="open tracking", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=is_transient)
@_translated()
def open_tracking(run: Run) -> str:
    """The id of the training run's MLflow run, which is created the first time and continued after."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    client = _client(run.home)
    experiment_id = _experiment(client, run.config, run.home)
    key = _key(run)
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        if _SETTINGS_LOGGED not in found[0].data.tags:
            _log_settings(client, run_id, run.config)
        return run_id
    config = run.config
    tags = {
        RUN_KEY: key,
        "method": config.method.label,
        "route_source": config.method.route_source,
        "model": config.model.path,
        "kappa": str(config.training.mini_steps),
        "seed": str(config.seed),
        **({COMPARISON: config.tracking.comparison} if config.tracking.comparison else {}),
        _ITERATIONS: "0",
        MLFLOW_RUN_NOTE: f"Artifacts of this run: `{run.store().name}`. Look with `moe-replay status {run.run_id}`.",
    }
    run_id = client.create_run(experiment_id, run_name=run.run_id, tags=tags).info.run_id
    _log_settings(client, run_id, config)
    return run_id


@task(
    name="track",
    task_run_name="track-{iteration}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=is_transient,
)
@_translated()
def track_iteration(run: Run, mlflow_run_id: str, iteration: int) -> dict[str, float]:
    """Log an iteration's metrics as one step, unless they are there already, and return them."""
    from mlflow.entities import Metric, RunTag

    metrics = iteration_metrics(run.store(), iteration)
    client = _client(run.home)
    logged = int(client.get_run(mlflow_run_id).data.tags.get(_ITERATIONS, "0"))
    if iteration >= logged:
        moment = _milliseconds(run, iteration)
        client.log_batch(
            mlflow_run_id,
            metrics=[Metric(key, value, moment, iteration) for key, value in sorted(metrics.items())],
            tags=[RunTag(_ITERATIONS, str(iteration + 1)), *_decision_tags(run, iteration, metrics)],
        )
    return metrics


def _decision_tags(run: Run, iteration: int, metrics: dict[str, float]) -> list[Any]:
    """By iteration up to this one, what was decided on the stability alarm; nothing where this one raised none."""
    from mlflow.entities import RunTag

    if ALARM_METRIC not in metrics:
        return []
    found = {n: run.store().committed("training", n) for n in range(iteration + 1)}
    told = {n: actions_in(training) for n, training in found.items() if training is not None}
    return [RunTag(_DECISIONS, "; ".join(f"{n}: {', '.join(actions)}" for n, actions in told.items() if actions))]


def finished_run(run: Run) -> str | None:
    """The id of the training run's MLflow run where that was closed with every iteration; none also without MLflow."""
    try:
        with _translated():
            client = _client(run.home)
            experiment = client.get_experiment_by_name(run.config.tracking.experiment)
            wanted = f"tags.`{RUN_KEY}` = '{_key(run)}' and attributes.status = 'FINISHED'"
            found = client.search_runs([experiment.experiment_id], wanted, max_results=1) if experiment else []
    except TrackingUnavailable:
        return None
    logged = int(found[0].data.tags.get(_ITERATIONS, "0")) if found else 0
    return found[0].info.run_id if logged >= run.config.iterations else None


@_translated()
def file_figures(run: Run, mlflow_run_id: str, folder: Path) -> None:
    """File what lies in `folder` with the run, in the place of earlier files of these names."""
    _client(run.home).log_artifacts(mlflow_run_id, str(folder), "figures")


@_translated()
def file_report(config: RunConfig, comparison: str, folder: Path) -> None:
    """File a comparison's report as an MLflow run of its own, which carries the tag of the runs that it compares."""
    client = _client(home_folder())
    experiment_id = _experiment(client, config, home_folder())
    wanted = f"tags.`{_REPORT_OF}` = '{comparison}'"
    found = client.search_runs([experiment_id], wanted, max_results=1)
    tags = {COMPARISON: comparison, _REPORT_OF: comparison}
    run_id = found[0].info.run_id if found else client.create_run(experiment_id, None, tags, comparison).info.run_id
    client.log_artifacts(run_id, str(folder))
    client.set_terminated(run_id, "FINISHED")


@task(name="close tracking", cache_policy=NO_CACHE)
def close_tracking(run: Run, mlflow_run_id: str, succeeded: bool) -> None:
    """Mark the MLflow run finished or failed; what MLflow raises is only logged, the run itself has ended."""
    try:
        _client(run.home).set_terminated(mlflow_run_id, "FINISHED" if succeeded else "FAILED")
    except Exception as error:
        get_run_logger().warning("MLflow run %s could not be closed (%s)", mlflow_run_id, type(error).__name__)


def _key(run: Run) -> str:
    """Tells a run from one of the same name that was deleted: where it is, and when and by whom it was created."""
    about = run.store().read_run().get("about", {})
    return f"{run.store().name}#{about.get('created_as', '')}"


def _milliseconds(run: Run, iteration: int) -> int:
    """When the iteration's last stage was committed: the same however often the step is logged."""
    finished = [status.finished for status in run.store().status(iteration) if status.finished is not None]
    return int(max(finished).timestamp() * 1000) if finished else 0


def _client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(home))


def _experiment(client: Any, config: RunConfig, home: Path) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    if experiment := client.get_experiment_by_name(name):
        return experiment.experiment_id
    # A tracking server knows where its artifacts go; a bare database would put them under the working folder.
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    try:
        artifacts = (home / "mlflow-artifacts").as_uri() if local else None
        return client.create_experiment(name, artifacts, tags=_SHOWN_AS_TRAINING)
    except MlflowException:
        # Another run created it in between.
        return client.get_experiment_by_name(name).experiment_id


def _log_settings(client: Any, run_id: str, config: RunConfig) -> None:
    from mlflow.entities import Param

    settings = dotted(config.model_dump(mode="json"))
    versions = {f"version.{name}": number for name, number in package_versions().items()}
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in (settings | versions).items()])
    client.log_dict(run_id, config.model_dump(mode="json"), "config.json")
    client.set_tag(run_id, _SETTINGS_LOGGED, "true")
