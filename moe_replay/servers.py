"""The MLflow UI and the Prefect server, on loopback; what any server there needs to be started, asked and stopped."""

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from rich.console import Console

from moe_replay.errors import ConfigError, EngineLost

HOST = "127.0.0.1"
MLFLOW_PORT, PREFECT_PORT = 5000, 4200
"""Where `serve` puts them by default."""
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_ASKED_TIMES = 4
_MOST_RESTARTS = 5
_PR_SET_PDEATHSIG = 1
_NAMED_BY = {"mlflow": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}


@dataclass(frozen=True)
class Server:
    """A server on loopback: how it is started, and where it says that it is well."""

    name: str
    port: int
    option: str
    """What the user sets to choose another port."""
    health: str
    command: list[str]
    environment: dict[str, str]
    healthy_status: int = 200
    """The status of the answer at `health` when all is well."""

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def start(self, logs: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start it as the leader of a process group of its own, which writes to `<logs>/<name>.log`."""
        with (logs / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 (our own command line)
                self.command, stdout=log, stderr=log, start_new_session=True, env=environment | self.environment
            )

    def is_healthy(self) -> bool:
        """Whether it answers as it should, within 2 s."""
        return _status_of(f"{self.address}{self.health}", 2) == self.healthy_status


def serve(home: Path, mlflow_port: int, prefect_port: int, console: Console) -> None:
    """Start both, print their addresses once they answer, and stop them on interrupt.

    A server that MLFLOW_TRACKING_URI or PREFECT_API_URL names is not started again; its address is printed.
    Raises ConfigError when a port is taken, EngineLost when a server ends by itself.
    """
    servers = _servers(home, mlflow_port, prefect_port)
    for server in servers:
        require_free(server)
    for name, variable in _NAMED_BY.items():
        if name not in {server.name for server in servers}:
            console.print(f"{name:8} is the server that {variable} names", highlight=False)
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    # Asked to end politely, this process must still end its servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for server in servers:
            running[server.name] = server.start(logs, dict(os.environ))
        for server in servers:
            wait_until_healthy(server, running[server.name], logs)
            console.print(f"{server.name:8} {server.address}", highlight=False)
        if not servers:
            return
        console.print("press Ctrl-C to stop", style="dim")
        while all(process.poll() is None for process in running.values()):
            time.sleep(0.5)
        ended = next(name for name, process in running.items() if process.poll() is not None)
        raise EngineLost(f"the {ended} server ended by itself; its log is {logs / ended}.log")
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        for process in running.values():
            _stop(process)


def require_named_servers() -> None:
    """Raise ConfigError when a server that MLFLOW_TRACKING_URI or PREFECT_API_URL names does not answer."""
    for name, variable in _NAMED_BY.items():
        address = os.environ.get(variable, "")
        if address.startswith(("http://", "https://")) and not _answers(address):
            parts = urlsplit(address)
            shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
            raise ConfigError(
                f"no {name} server answers at {shown}, which {variable} names; start it (make up, or moe-replay ui), "
                "or unset the variable"
            )


def _answers(address: str) -> bool:
    """Whether anything speaks HTTP there, be it to refuse us; a server that starts or is busy has a while."""
    for attempt in range(_ASKED_TIMES):
        if attempt:
            time.sleep(1)
        if _status_of(address, 10) is not None:
            return True
    return False


def _status_of(address: str, seconds: float) -> int | None:
    """The HTTP status of an answer, be it an error; None when none came in time."""
    try:
        with urllib.request.urlopen(address, timeout=seconds) as answer:  # noqa: S310 (http)
            return answer.status
    except urllib.error.HTTPError as answer:
        return answer.code
    except (OSError, http.client.HTTPException):
        return None


@contextmanager
def prefect_server(home: Path) -> Iterator[Callable[[], None]]:
    """A Prefect server for this process alone, named to Prefect by PREFECT_API_URL, unless the user named one.

    Raises ConfigError when a server that the user named, this one or MLflow's, does not answer.

    Yields a function that waits until it answers; from then on it is started again when it ends, as its database
    holds all that it knows, and Prefect asks again for a while. Enter it before Prefect is imported. Prefect's own
    temporary server shares our terminal's Ctrl-C, so that it is gone when the interrupted run reports to it, and
    outlives a SIGKILL.
    """
    require_named_servers()
    if os.environ.get("PREFECT_API_URL"):
        yield lambda: None
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", HOST, "--port", str(port), "--log-level", "warning", "--timeout-keep-alive", "5"]
    server = Server("prefect", port, "", "/api/health", command, {})
    kept = _KeptServer(command, logs / "prefect.log")
    os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
    # This server is gone when anybody follows a link; `serve` shows its database afterwards.
    ui_is_named = "PREFECT_UI_URL" in os.environ
    if not ui_is_named:
        os.environ["PREFECT_UI_URL"] = f"http://{HOST}:{PREFECT_PORT}"
    waited_for = False

    def wait() -> None:
        nonlocal waited_for
        waited_for = True
        wait_until_healthy(server, kept.process, logs)
        kept.restart_when_it_ends()

    try:
        yield wait
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        if not ui_is_named:
            os.environ.pop("PREFECT_UI_URL", None)
        # One that nobody has spoken to has nothing to finish, and would first start before it ends politely.
        kept.stop((signal.SIGTERM, signal.SIGKILL) if waited_for else (signal.SIGKILL,))


class _KeptServer:
    """A server of this process alone."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self._stopping = False
        self._starting = threading.Lock()
        """So that none is started while, or after, it is stopped."""
        self.process = self._start()

    def restart_when_it_ends(self) -> None:
        """Watch it in another thread until it is stopped; it is started again a few times."""
        threading.Thread(target=self._keep, name="prefect server", daemon=True).start()

    def stop(self, signals: Sequence[signal.Signals]) -> None:
        """End it for good."""
        with self._starting:
            self._stopping = True
        _stop(self.process, signals)

    def _keep(self) -> None:
        for _ in range(_MOST_RESTARTS):
            code = self.process.wait()
            with self._starting:
                if self._stopping:
                    return
                told = f"the Prefect server ended (exit code {code}) and is started again; its log is {self._log}"
                print(told, file=sys.stderr)
                self.process = self._start()
        # The kernel ends it with the thread that started it.
        self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 (our own command line)
                self._command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent
            )


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def mlflow_server(port: int, option: str, store: str, artifacts: list[str]) -> Server:
    """MLflow over the database `store`; `artifacts` are the options that say where files go."""
    where = ["--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        # By the environment, since a database's URL may hold a password and command lines are public.
        "MLFLOW_BACKEND_STORE_URI": store,
        # A dozen processes for features of MLflow that have no part in training runs.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", *where, *artifacts]
    return Server("mlflow", port, option, "/health", command, environment)


def prefect_ui_server(port: int, option: str) -> Server:
    """Prefect's API and UI over the database in PREFECT_HOME, or the one that Prefect's own settings name."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {"PREFECT_UI_API_URL": f"http://{HOST}:{port}/api"}
    return Server("prefect", port, option, "/api/health", command, environment)


def _servers(home: Path, mlflow_port: int, prefect_port: int) -> list[Server]:
    """What has to be started, since the environment names no server of its kind."""
    servers = []
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    if not tracking.startswith(("http://", "https://")):
        artifacts = ["--default-artifact-root", (home / "mlflow-artifacts").as_uri()]
        servers.append(mlflow_server(mlflow_port, "--mlflow-port", tracking, artifacts))
    if not os.environ.get("PREFECT_API_URL"):
        servers.append(prefect_ui_server(prefect_port, "--prefect-port"))
    return servers


def require_free(server: Server) -> None:
    """Raise ConfigError when somebody listens on the server's port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, server.port))
        except OSError as error:
            raise ConfigError(f"port {server.port} on {HOST} is taken; choose another with {server.option}") from error


def wait_until_healthy(server: Server, process: subprocess.Popen[bytes], logs: Path) -> None:
    """Return once it answers; raises EngineLost when it ends before, or is silent for two minutes."""
    log = logs / f"{server.name}.log"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineLost(f"the {server.name} server ended with exit code {process.returncode}; its log is {log}")
        if server.is_healthy():
            return
        time.sleep(0.3)
    raise EngineLost(f"the {server.name} server did not answer within {_START_SECONDS:.0f} s; its log is {log}")


def _stop(
    server: subprocess.Popen[bytes], signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)
) -> None:
    """End a server with its workers: it leads a process group of its own."""
    for number in signals:
        try:
            os.killpg(server.pid, number)
            server.wait(_STOP_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
