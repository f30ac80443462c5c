"""What `prefect deploy --all` makes of prefect.yaml, and a worker that serves it: real server, real worker."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import ask, until
from command import SMALL
from prefect_server import SCHEDULES_EVERY_SECONDS

from moe_replay.config import RunConfig
from moe_replay.config_reading import document_with
from moe_replay.evaluations import EvaluationRequest
from moe_replay.sections import EvaluationConfig, RolloutConfig

REPOSITORY = Path(__file__).parents[2]
ITERATIONS = 8


def prefect(*words: str) -> None:
    """Run Prefect's command line in the repository."""
    environment = {**os.environ, "PWD": str(REPOSITORY)}
    command = [sys.executable, "-m", "prefect", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployments(prefect_api: str, prefect_for_commands: None) -> dict[str, dict[str, Any]]:
    """What was deployed, by name."""
    prefect("work-pool", "create", "local", "--type", "process")
    prefect("--no-prompt", "deploy", "--all")
    return {one["name"]: one for one in ask(f"{prefect_api}/deployments/filter", {})}


@contextmanager
def at_work(log: Path) -> Iterator[psutil.Process]:
    """A worker of the pool `local` as the documents start it; ended with all that it started."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local"]
    command += ["--limit", "1", "--install-policy", "never"]
    environment = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "5"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=REPOSITORY, env=environment)
    worker = psutil.Process(process.pid)
    try:
        yield worker
    finally:
        # A worker that is told to end waits for its flow runs.
        with suppress(psutil.NoSuchProcess):
            for one in (*worker.children(recursive=True), worker):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait(20)


@pytest.fixture(scope="module")
def first_worker(deployments: dict, home: Path) -> Iterator[psutil.Process]:
    """Before the power cut."""
    with at_work(home / "first-worker.log") as process:
        yield process


@pytest.fixture(scope="module")
def worker(crashed: dict[str, Any], home: Path) -> Iterator[psutil.Process]:
    """After the power cut."""
    with at_work(home / "worker.log") as process:
        yield process


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
    deployments: dict, first_worker: psutil.Process, prefect_api: str, parameters: dict[str, Any], run_folder: Path
) -> dict[str, Any]:
    """A flow run that a schedule has started, and that has trained an iteration."""
    url = f"{prefect_api}/deployments/{deployments['train']['id']}/schedules"
    # What is past when the server looks at schedules is due in a day.
    soon = (datetime.now(UTC) + timedelta(seconds=2 * SCHEDULES_EVERY_SECONDS)).isoformat()
    schedule = {"interval": timedelta(days=1).total_seconds(), "anchor_date": soon}
    ask(url, [{"schedule": schedule, "active": True, "slug": "soon", "parameters": parameters}])
    until(lambda: (run_folder / "iterations/00000/training/_committed.json").exists(), "nothing was trained")
    return next(run for run in flow_runs(prefect_api, deployments["train"]) if run["state_type"] == "RUNNING")


@pytest.fixture(scope="module")
def crashed(scheduled: dict[str, Any], first_worker: psutil.Process, prefect_api: str) -> dict[str, Any]:
    """The flow run after a power cut, of which the automation of dead flow runs told (see test_alerts)."""
    family = [first_worker, *first_worker.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    flow_run = f"{prefect_api}/flow_runs/{scheduled['id']}"
    assert ask(flow_run, method="GET")["state_type"] == "RUNNING"
    ask(f"{flow_run}/set_state", {"state": {"type": "CRASHED", "message": "no sign of life"}})
    return scheduled


@pytest.fixture(scope="module")
def retried(crashed: dict[str, Any], worker: psutil.Process, run_folder: Path, prefect_api: str) -> dict[Path, int]:
    """Retry the flow run until it has trained an iteration more; when what was there before had been committed."""
    before = commits(run_folder)
    prefect("flow-run", "retry", crashed["id"])
    trained = len([path for path in before if path.parent.name == "training"])
    until((run_folder / f"iterations/{trained:05d}/training/_committed.json").exists, "the retried run trained nothing")
    return before


@pytest.fixture(scope="module")
def waiting(retried: dict[Path, int], deployments: dict, prefect_api: str, run_folder: Path) -> dict[str, Any]:
    """A flow run of another deployment, as it was once the worker had been told of it beside the retried one."""
    url = f"{prefect_api}/deployments/{deployments['archive-gc']['id']}/create_flow_run"
    created = ask(url, {"parameters": {"root": run_folder.parent.as_uri()}, "state": {"type": "SCHEDULED"}})
    for _ in range(2):  # the first may have been asked for before
        polled = last_polled(prefect_api)
        until(lambda polled=polled: last_polled(prefect_api) != polled, "the worker asked for no further flow runs")
    return ask(f"{prefect_api}/flow_runs/{created['id']}", method="GET")


@pytest.fixture(scope="module")
def cancelled(
    crashed: dict[str, Any],
    retried: dict[Path, int],
    waiting: dict[str, Any],
    worker: psutil.Process,
    prefect_api: str,
) -> list[psutil.Process]:
    """The processes of a flow run that was cancelled in the UI's way."""
    family = worker.children(recursive=True)
    ask(f"{prefect_api}/flow_runs/{crashed['id']}/set_state", {"state": {"type": "CANCELLING"}})
    state = f"{prefect_api}/flow_runs/{crashed['id']}"
    until(lambda: ask(state, method="GET")["state_type"] == "CANCELLED", "the flow run was not cancelled")
    return family


def commits(run_folder: Path) -> dict[Path, int]:
    """What is committed, and when that was."""
    return {path: path.stat().st_mtime_ns for path in run_folder.glob("iterations/*/[!_]*/_committed.json")}


def last_polled(api: str) -> str | None:
    """When a worker last asked for flow runs."""
    return ask(f"{api}/work_pools/local/queues/default", method="GET")["last_polled"]


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


@pytest.mark.slow
def test_a_flow_run_that_died_with_its_worker_goes_on_when_it_is_retried(
    crashed: dict[str, Any], retried: dict[Path, int], run_folder: Path, prefect_api: str
) -> None:
    assert len(retried) >= 3
    assert retried.items() < commits(run_folder).items(), "a committed stage ran again"
    found = ask(f"{prefect_api}/flow_runs/{crashed['id']}", method="GET")
    assert (found["name"], found["run_count"], found["state_type"]) == ("train-nightly", 2, "RUNNING")


@pytest.mark.slow
def test_cancel_stops_flow_and_engines_and_leaves_no_process_behind(
    cancelled: list[psutil.Process], worker: psutil.Process
) -> None:
    assert len(cancelled) >= 3  # the flow run and two engines
    assert psutil.wait_procs(cancelled, timeout=20)[1] == []
    assert worker.is_running()


@pytest.mark.slow
def test_flow_runs_of_two_deployments_have_the_machine_one_after_the_other(
    waiting: dict[str, Any], cancelled: list[psutil.Process], prefect_api: str
) -> None:
    assert waiting["state_type"] == "SCHEDULED"
    state = f"{prefect_api}/flow_runs/{waiting['id']}"
    until(lambda: ask(state, method="GET")["state_type"] == "COMPLETED", "the flow run that waited did not complete")


@pytest.mark.slow
def test_a_new_run_of_the_deployment_goes_on_where_the_cancelled_one_stopped(
    cancelled: list[psutil.Process],
    deployments: dict[str, dict[str, Any]],
    prefect_api: str,
    parameters: dict[str, Any],
    run_folder: Path,
) -> None:
    kept = commits(run_folder)
    assert 3 <= len(kept) < 4 * ITERATIONS, "cancelled too late to leave anything to be done"

    url = f"{prefect_api}/deployments/{deployments['train']['id']}/create_flow_run"
    created = ask(url, {"parameters": parameters, "state": {"type": "SCHEDULED"}})
    state = f"{prefect_api}/flow_runs/{created['id']}"
    final = until(
        lambda: (s := ask(state, method="GET")["state"])["type"] in ("COMPLETED", "FAILED", "CRASHED") and s,
        "the new flow run did not end",
    )

    assert final["type"] == "COMPLETED", final["message"]
    assert kept.items() < commits(run_folder).items(), "a committed stage ran again"
    assert len(commits(run_folder)) == 4 * ITERATIONS
