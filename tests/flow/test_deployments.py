"""What `prefect deploy --all` makes of prefect.yaml, and a worker that serves it: real server, real worker."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import ask
from command import SMALL

from moe_replay.config import EvaluationConfig, RolloutConfig, RunConfig, document_with
from moe_replay.evaluations import EvaluationRequest

REPOSITORY = Path(__file__).parents[2]
ITERATIONS = 8


def prefect(*words: str) -> None:
    """Run Prefect's command line in the repository."""
    environment = {**os.environ, "PWD": str(REPOSITORY)}
    command = [sys.executable, "-m", "prefect", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Wait for a condition, and return what it gives."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")
def deployments(prefect_api: str, prefect_for_commands: None) -> dict[str, dict[str, Any]]:
    """What was deployed, by name."""
    prefect("work-pool", "create", "local", "--type", "process")
    prefect("--no-prompt", "deploy", "--all")
    return {one["name"]: one for one in ask(f"{prefect_api}/deployments/filter", {})}


@pytest.fixture(scope="module")
def worker(deployments: dict, prefect_api: str, home: Path) -> Iterator[psutil.Process]:
    """A worker of the pool `local`; stopped by its own process id."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--install-policy", "never"]
    with (home / "worker.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
    yield psutil.Process(process.pid)
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a small training under a root of its own."""
    settings = {**SMALL, "iterations": ITERATIONS, "storage.root": tmp_path_factory.mktemp("deployed").as_uri()}
    return {"run_id": "nightly", "config": document_with(settings)}


@pytest.fixture(scope="module")
def run_folder(parameters: dict[str, Any]) -> Path:
    """Where the training's artifacts are."""
    return Path(parameters["config"]["storage"]["root"].removeprefix("file://")) / "nightly"


@pytest.fixture(scope="module")
def scheduled(
    deployments: dict, worker: psutil.Process, prefect_api: str, parameters: dict[str, Any], run_folder: Path
) -> dict[str, Any]:
    """A flow run that a schedule has started, and that has trained an iteration."""
    url = f"{prefect_api}/deployments/{deployments['train']['id']}/schedules"
    soon = (datetime.now(UTC) + timedelta(seconds=4)).isoformat()
    schedule = {"interval": timedelta(days=1).total_seconds(), "anchor_date": soon}
    ask(url, [{"schedule": schedule, "active": True, "slug": "soon", "parameters": parameters}])
    until(lambda: (run_folder / "iterations/00000/training/_committed.json").exists(), "nothing was trained")
    return next(run for run in flow_runs(prefect_api, deployments["train"]) if run["state_type"] == "RUNNING")


@pytest.fixture(scope="module")
def cancelled(scheduled: dict[str, Any], worker: psutil.Process, prefect_api: str) -> list[psutil.Process]:
    """The processes of a flow run that was cancelled in the UI's way."""
    family = worker.children(recursive=True)
    ask(f"{prefect_api}/flow_runs/{scheduled['id']}/set_state", {"state": {"type": "CANCELLING"}})
    state = f"{prefect_api}/flow_runs/{scheduled['id']}"
    until(lambda: ask(state, method="GET")["state_type"] == "CANCELLED", "the flow run was not cancelled")
    return family


def flow_runs(api: str, deployment: dict[str, Any]) -> list[dict[str, Any]]:
    """The flow runs of a deployment."""
    return ask(f"{api}/flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}})


def test_deploy_all_registers_every_flow_offline(deployments: dict[str, dict[str, Any]]) -> None:
    assert {name: one["entrypoint"] for name, one in deployments.items()} == {
        "train": "flows.train.train",
        "compare": "flows.compare.compare",
        "evaluate": "flows.evaluate.evaluate",
        "archive-gc": "flows.maintenance.archive_gc",
    }
    for one in deployments.values():
        assert (one["work_pool_name"], "moe-replay" in one["tags"]) == ("local", True)
        assert one["global_concurrency_limit"]["limit"] == 1
        assert one["pull_steps"] == [
            {"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}
        ]
    strategies = {name: one["concurrency_options"]["collision_strategy"] for name, one in deployments.items()}
    assert strategies == {
        "train": "ENQUEUE",
        "compare": "ENQUEUE",
        "evaluate": "CANCEL_NEW",
        "archive-gc": "CANCEL_NEW",
    }
    schedules = {(name, s["slug"]): s["active"] for name, one in deployments.items() for s in one["schedules"]}
    assert schedules == {
        ("train", "twice-a-day"): False,
        ("compare", "weekly"): False,
        ("evaluate", "nightly"): False,
        ("archive-gc", "weekly"): True,
    }


def test_forms_show_every_setting_with_its_docstring(deployments: dict[str, dict[str, Any]]) -> None:
    shown = {name: one["parameter_openapi_schema"] for name, one in deployments.items()}
    for flow, model in (("train", RunConfig), ("compare", RunConfig), ("evaluate", EvaluationRequest)):
        for section in (model, RolloutConfig, EvaluationConfig):
            properties = shown[flow]["definitions"][section.__name__]["properties"]
            for key, field in section.model_fields.items():
                if field.description:
                    assert properties[key]["description"] == field.description
    undescribed = [
        (flow, key)
        for flow, schema in shown.items()
        for key, one in schema["properties"].items()
        if "description" not in one
    ]
    assert undescribed == []


def test_a_schedule_starts_a_run_that_trains_the_embedded_model(scheduled: dict[str, Any]) -> None:
    assert scheduled["auto_scheduled"]
    assert scheduled["name"] == "train-nightly"


def test_cancel_stops_flow_and_engines_and_leaves_no_process_behind(
    cancelled: list[psutil.Process], worker: psutil.Process
) -> None:
    assert len(cancelled) >= 3  # the flow run and two engines
    assert psutil.wait_procs(cancelled, timeout=20)[1] == []
    assert worker.is_running()


def test_a_new_run_of_the_deployment_goes_on_where_the_cancelled_one_stopped(
    cancelled: list[psutil.Process],
    deployments: dict[str, dict[str, Any]],
    prefect_api: str,
    parameters: dict[str, Any],
    run_folder: Path,
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in run_folder.rglob("_committed.json")}
    assert 3 <= len(kept) < 4 * ITERATIONS, "cancelled too late to leave anything to be done"

    url = f"{prefect_api}/deployments/{deployments['train']['id']}/create_flow_run"
    created = ask(url, {"parameters": parameters, "state": {"type": "SCHEDULED"}})
    state = f"{prefect_api}/flow_runs/{created['id']}"
    final = until(
        lambda: (s := ask(state, method="GET")["state"])["type"] in ("COMPLETED", "FAILED", "CRASHED") and s,
        "the new flow run did not end",
        200,
    )

    assert final["type"] == "COMPLETED", final["message"]
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items()), "a committed stage ran again"
    assert len(list(run_folder.glob("iterations/*/[!_]*/_committed.json"))) == 4 * ITERATIONS
