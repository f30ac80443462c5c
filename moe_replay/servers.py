"""The MLflow UI and the Prefect server, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console

from moe_replay.errors import ConfigError, EngineLost

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_HOST = "127.0.0.1"


def serve(home: Path, mlflow_port: int, prefect_port: int, console: Console) -> None:
    """Start both, print their addresses once they answer, and stop them on interrupt.

    Raises ConfigError when a port is taken, EngineLost when a server ends by itself.
    """
    for port, option in ((mlflow_port, "--mlflow-port"), (prefect_port, "--prefect-port")):
        _require_free(port, option)
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    commands = {
        "MLflow": (mlflow_port, "/health", _mlflow_command(home, mlflow_port)),
        "Prefect": (prefect_port, "/api/health", _prefect_command(prefect_port)),
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    # Asked to end politely, this process must still end its servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name, (port, _, command) in commands.items():
            with (logs / f"{name.lower()}.log").open("ab") as log:
                running[name] = subprocess.Popen(  # noqa: S603 (our own command line)
                    command, stdout=log, stderr=log, start_new_session=True, env=_environment(home, port)
                )
        for name, (port, path, _) in commands.items():
            _wait_until_healthy(name, running[name], f"http://{_HOST}:{port}{path}", logs / f"{name.lower()}.log")
            console.print(f"{name:8} http://{_HOST}:{port}", highlight=False)
        console.print("press Ctrl-C to stop both", style="dim")
        while all(server.poll() is None for server in running.values()):
            time.sleep(0.5)
        ended = next(name for name, server in running.items() if server.poll() is not None)
        raise EngineLost(f"the {ended} server ended by itself; its log is {logs / ended.lower()}.log")
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        for server in running.values():
            _stop(server)


def _mlflow_command(home: Path, port: int) -> list[str]:
    database = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    where = ["--backend-store-uri", database, "--default-artifact-root", (home / "mlflow-artifacts").as_uri()]
    return [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1", *where]


def _prefect_command(port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", _HOST, "--port", str(port)]


def _environment(home: Path, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "PREFECT_UI_API_URL": f"http://{_HOST}:{port}/api",
        "PREFECT_HOME": str(home / "prefect"),
        # A dozen processes for features of MLflow that have no part in training runs.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _require_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {_HOST} is taken; choose another with {option}") from error


def _wait_until_healthy(name: str, server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise EngineLost(f"the {name} server ended with exit code {server.returncode}; its log is {log}")
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 (a loopback address of ours)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise EngineLost(f"the {name} server did not answer {url} within {_START_SECONDS:.0f} s; its log is {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End a server with its workers: it leads a process group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(_STOP_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
