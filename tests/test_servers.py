"""`moe-replay ui` starts the real MLflow and Prefect servers, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from prefect_server import free_port

from moe_replay import servers
from moe_replay.errors import ConfigError


def test_ui_serves_both_and_ends_them_when_terminated(tmp_path: Path) -> None:
    ports = {"--mlflow-port": free_port(), "--prefect-port": free_port()}
    options = [f"{option}={port}" for option, port in ports.items()]
    outside = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"}
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    command = [str(Path(sys.executable).with_name("moe-replay")), "ui", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"MOE_REPLAY_HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")},
    )
    assert process.stdout is not None
    # A line for each server once it answers, and one that tells how to stop.
    said = "".join(process.stdout.readline() for _ in range(3))
    family = psutil.Process(process.pid).children(recursive=True)
    for port, path in zip(ports.values(), ("/health", "/api/health"), strict=True):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            assert answer.status == 200
    process.send_signal(signal.SIGTERM)
    process.wait(60)

    assert all(f"http://127.0.0.1:{port}" in said for port in ports.values())
    deadline = time.monotonic() + 10
    while any(child.is_running() for child in family):
        assert time.monotonic() < deadline, "a server outlived the command that started it"
        time.sleep(0.1)


def test_prefect_server_of_a_run_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from moe_replay.servers import prefect_server\n"
        "with prefect_server(Path(sys.argv[1])) as wait:\n    wait(); print('up', flush=True); time.sleep(60)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PREFECT_HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()

    assert family
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_prefect_server_of_a_run_is_started_again_when_it_ends_and_not_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with servers.prefect_server(tmp_path) as wait:
        wait()
        address, [first] = os.environ["PREFECT_API_URL"], servers_of_this_process()
        first.kill()
        deadline = time.monotonic() + 60
        while not answers(f"{address}/health"):
            assert time.monotonic() < deadline, "no server was started in its place"
            time.sleep(0.2)
        [second] = servers_of_this_process()
    assert second.pid != first.pid
    assert not second.is_running()
    assert "the Prefect server ended (exit code -9) and is started again; its log is" in capfd.readouterr().err


def servers_of_this_process() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [one for one in children if one.status() != psutil.STATUS_ZOMBIE and "uvicorn" in one.cmdline()]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.parametrize("variable", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_a_server_that_is_named_and_does_not_answer_is_told_at_once_and_without_its_password(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_ASKED_TIMES", 1)
    monkeypatch.setenv(variable, f"http://me:secret@127.0.0.1:{free_port()}/api")
    with pytest.raises(
        ConfigError, match=rf"no \w+ server answers at http://127.0.0.1:\d+/api, which {variable}"
    ) as told:
        servers.require_named_servers()
    assert "secret" not in str(told.value)
