"""What MLflow and Prefect say of runs, asked as any client would."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from mlflow import MlflowClient


def mlflow() -> MlflowClient:
    """The database that the runs of this session log to."""
    return MlflowClient(f"sqlite:///{os.environ['MOE_REPLAY_HOME']}/mlflow.db")


def mlflow_steps(run_id: str, key: str) -> list[int]:
    """Steps at which a metric was logged, in order, repetitions included."""
    return sorted(point.step for point in mlflow().get_metric_history(run_id, key))


def checkpoints(run_id: str) -> list[Any]:
    """Models that stand for a run's checkpoints, by name."""
    experiment = mlflow().get_run(run_id).info.experiment_id
    found = mlflow().search_logged_models([experiment], f"source_run_id = '{run_id}'")
    return sorted(found, key=lambda model: model.name)


_RECORDED_SECONDS = 2
"""Until Prefect's server has written down what it was told of tasks, which it does every second."""


def tasks_of(api: str, flow_runs: list[str]) -> list[dict[str, Any]]:
    """Task runs of flow runs with these names, which have ended."""
    time.sleep(_RECORDED_SECONDS)
    flows = ask(f"{api}/flow_runs/filter", {"flow_runs": {"name": {"any_": flow_runs}}})
    return ask(f"{api}/task_runs/filter", {"flow_runs": {"id": {"any_": [flow["id"] for flow in flows]}}})


def ask(url: str, body: Any = None, method: str = "POST") -> Any:
    """What a server answers in JSON to a body in JSON; None where it has nothing to say.

    Asked again while it is unavailable, as Prefect's own client does: on SQLite Prefect's database is locked at times.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def until(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """Wait for a condition, and return what it gives."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
        time.sleep(0.3)
    return found
