"""The local stack: its real services start, serve a run, are told from strangers, and leave nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from asking import ask
from command import SMALL, run_json
from prefect_server import free_port

from infra.stack_state import Stack, read, save, write_secret
from moe_replay.tiny import EmbeddedAssets

REPOSITORY = Path(__file__).parents[1]
LONGEST_START = 180
# Each of them would lead services, or clients, to what is not the stack's.
FOREIGN = {
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    "AWS_PROFILE": "of-another-store",
    "AWS_REGION": "eu-central-1",
    "AWS_SESSION_TOKEN": "of-another-store",
    "MLFLOW_TRACKING_TOKEN": "of-another-server",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "PREFECT_API_AUTH_STRING": "of:another",
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/prefect.db",
    "PREFECT_API_URL": "http://127.0.0.1:9/api",
    "PREFECT_HOME": "/nowhere",
    "PREFECT_SERVER_API_AUTH_STRING": "of:another",
}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell with a home of its own, free ports and settings of other systems' servers.

    The stack is down in the end.
    """
    ports = {name: str(free_port()) for name in ("PREFECT_PORT", "MLFLOW_PORT", "S3_PORT", "WORKER_PORT")}
    environment = os.environ | FOREIGN | ports | {"MOE_REPLAY_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    yield environment
    stack("down", environment)


@pytest.mark.slow
def test_the_stack_serves_a_run_survives_the_loss_of_services_and_leaves_nothing_behind(
    shell: dict[str, str], tmp_path: Path, home: Path, assets: EmbeddedAssets
) -> None:
    assert stack("up", shell).returncode == 0
    assert stack("status", shell).stdout.count(" up ") == 4
    pids = read(tmp_path).pids
    assert "nothing was changed" in stack("up", shell).stdout
    assert read(tmp_path).pids == pids

    client = exported(tmp_path / "stack" / "env", FOREIGN | {"AWS_MAX_ATTEMPTS": "7", "UNRELATED": "AWS_PROFILE=1"})
    assert (client.pop("AWS_MAX_ATTEMPTS"), client.pop("UNRELATED")) == ("7", "AWS_PROFILE=1")
    assert client.keys() & FOREIGN.keys() == {"MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"}
    assert not {client[name] for name in client.keys() & FOREIGN.keys()} & {*FOREIGN.values()}
    assert (tmp_path / "stack" / "env").stat().st_mode & 0o077 == 0
    assert not any(client["AWS_SECRET_ACCESS_KEY"] in word for p in processes_of(tmp_path) for word in p.cmdline())
    assert deployments(client["PREFECT_API_URL"]) >= {"train"}
    assert "--limit 1" in " ".join(read(tmp_path).leader("worker").cmdline())
    # As from another machine: the run's own home is not the stack's.
    client |= {"MOE_REPLAY_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    run = run_json("run", "--run-id=small", "--iterations=1", "--root=s3://runs/test", settings=SMALL, **client)
    assert run["root"] == "s3://runs/test"
    assert len(list((tmp_path / "s3" / "runs" / "test" / "small").rglob("_committed.json"))) == 4
    assert list((tmp_path / "mlflow-artifacts").rglob("config.json")), "MLflow's server did not take the files"

    for lost in ("s3", "mlflow"):
        os.kill(pids[lost], signal.SIGKILL)
    told = stack("status", shell)
    assert told.returncode == 1
    assert [line.split()[1] for line in told.stdout.splitlines()] == ["down", "up", "down", "up"]
    assert stack("up", shell).returncode == 0
    now = read(tmp_path).pids
    assert {name for name in pids if now[name] != pids[name]} == {"s3", "mlflow"}
    assert stack("status", shell).returncode == 0

    os.kill(now["prefect"], signal.SIGKILL)
    family = processes_of(tmp_path)
    assert stack("down", shell).returncode == 0
    assert psutil.wait_procs(family, timeout=0)[1] == []
    assert processes_of(tmp_path) == []
    assert "nothing ran" in stack("down", shell).stdout


def test_a_pid_that_is_a_strangers_by_now_is_left_alone(shell: dict[str, str], tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"], env=shell | {"MOE_REPLAY_STACK": "of another home:s3"})
    try:
        (tmp_path / "stack").mkdir()
        save(tmp_path, Stack(pids={"s3": stranger.pid, "worker": 2**22 + 1}))

        assert "nothing ran" in stack("down", shell).stdout
        assert stack("status", shell).stdout.count(" down ") == 4
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_nothing_starts_while_a_port_is_taken(shell: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(shell["WORKER_PORT"])))
        taken.listen()
        refused = stack("up", shell)

    assert refused.returncode == 2
    assert f"port {shell['WORKER_PORT']} on 127.0.0.1 is taken; choose another with WORKER_PORT" in refused.stderr
    assert processes_of(tmp_path) == []


def test_a_state_that_is_no_stacks_is_refused(shell: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "stack").mkdir()
    write_secret(tmp_path / "stack" / "stack.json", "{}}")

    refused = stack("down", shell)

    assert refused.returncode == 2
    assert "does not describe a stack" in refused.stderr
    (tmp_path / "stack" / "stack.json").unlink()


def stack(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.stack", command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_START,
        check=False,
    )


def exported(file: Path, before: dict[str, str]) -> dict[str, str]:
    """What a shell with the variables `before` has after it read the file."""
    print_environment = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    shown = subprocess.run(
        ["sh", "-c", f". {file} && {print_environment}"], env=before, capture_output=True, check=True
    )
    return {key: value for key, value in json.loads(shown.stdout).items() if key not in ("PWD", "SHLVL", "_")}


def processes_of(home: Path) -> list[psutil.Process]:
    return [process for name in ("worker", "prefect", "mlflow", "s3") for process in read(home).processes(name)]


def deployments(api: str) -> set[str]:
    return {deployment["name"] for deployment in ask(f"{api}/deployments/filter", {})}
