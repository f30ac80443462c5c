"""The MLflow server or database that the environment names: client, experiment, pages, and what its errors mean."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_replay.config import RunConfig
from moe_replay.errors import TrackingUnavailable
from tasks.links import mlflow_page

_PERMANENT = {"INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST"}
_SHOWN_AS_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's UI open the experiment with charts of training runs, not with those of language model applications."""


@contextmanager
def errors_translated() -> Iterator[None]:
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


def client_of(home: Path) -> Any:
    """MLflow's client of what `tracking_uri` names."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(home))


def experiment_of(client: Any, config: RunConfig, home: Path) -> str:
    """The id of the experiment that the config names, which is created the first time."""
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


@errors_translated()
def run_page(home: Path, mlflow_run_id: str) -> str:
    """Address of the run in MLflow's UI."""
    uri = tracking_uri(home)
    return mlflow_page(uri, client_of(home).get_run(mlflow_run_id).info.experiment_id, mlflow_run_id)
