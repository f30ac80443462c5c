"""A machine to break: the processes, homes and Prefect server of runs, all found and killed from outside."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import psutil
from command import arguments

_MARK = "MOE_REPLAY_TESTED_MACHINE"
"""In the environment of every process of a machine, so that orphans are found too."""
_SERVER_SECONDS = 120
_GONE_SECONDS = 15


class Machine:
    """One home, the MLflow database of all runs, and either a Prefect server beside the runs or one in each command."""

    def __init__(self, folder: Path, embedded: Path, mlflow: str, prefect: str | None = None):
        """`embedded` is a folder with embedded models to share, `mlflow` a tracking URI, `prefect` an API elsewhere."""
        self._folder, self._embedded, self._mlflow, self._prefect = folder, embedded, mlflow, prefect
        self._mark = uuid.uuid4().hex
        self._server: tuple[subprocess.Popen[bytes], int] | None = None
        self.home = folder
        self.move(shares_model=True)

    def move(self, shares_model: bool) -> None:
        """What a fresh checkout has: an empty home and Prefect database; the model is made again unless shared."""
        self.home = self._folder / f"home-{uuid.uuid4().hex[:8]}"
        self.home.mkdir(parents=True)
        if shares_model:
            (self.home / "embedded").symlink_to(self._embedded)

    def start(self, *words: str, settings: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
        """Start a moe-replay command in the home, with its output in `log`."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                arguments(*words, settings=settings),
                stdout=stream,
                stderr=stream,
                cwd=self.home,
                env=self._environment(),
            )

    def processes(self) -> list[psutil.Process]:
        """Everything that runs here, the Prefect server apart."""
        server = self._server[0].pid if self._server else None
        return [one for one in psutil.process_iter() if one.pid != server and self._is_ours(one)]

    def engines(self) -> list[psutil.Process]:
        """The engines at work or at rest."""
        return [one for one in self.processes() if "multiprocessing.spawn" in _command_of(one)]

    @property
    def has_prefect(self) -> bool:
        """Whether a Prefect server runs: the shared one, or one that a command started for itself."""
        return self._server is not None or bool(self._own_servers())

    def outlived(self) -> list[str]:
        """Commands of what still runs when everything has had the time to end."""
        deadline = time.monotonic() + _GONE_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [_command_of(one) for one in left]

    def kill_everything(self, order: random.Random) -> None:
        """SIGKILL every process, the Prefect server too."""
        doomed = [one.pid for one in self.processes()]
        doomed += [self._server[0].pid] if self._server else []
        order.shuffle(doomed)
        for pid in doomed:
            kill(pid)

    def share_prefect(self) -> None:
        """From now on commands use one server that outlives them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._server = self._serve(port), port
        self.await_prefect()

    def stop_sharing_prefect(self) -> None:
        """End the shared server; commands have their own again."""
        if self._server is not None:
            self._server[0].terminate()
            self._server[0].wait(30)
        self._server = None

    def kill_prefect(self) -> None:
        """SIGKILL the shared server, or the one that a command started for itself."""
        for pid in [self._server[0].pid] if self._server else [one.pid for one in self._own_servers()]:
            kill(pid)

    def restart_prefect(self) -> None:
        """Start the shared server again on its port and database, where there is one and it is gone."""
        if self._server is not None and self._server[0].wait(10) is not None:
            self._server = self._serve(self._server[1]), self._server[1]

    def await_prefect(self) -> None:
        """Return once the shared server answers, where there is one."""
        if self._server is None:
            return
        server, port = self._server
        deadline = time.monotonic() + _SERVER_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, f"the Prefect server ended with code {server.returncode}"
                assert time.monotonic() < deadline, f"the Prefect server did not answer in {_SERVER_SECONDS} s"
                time.sleep(0.1)

    def _own_servers(self) -> list[psutil.Process]:
        return [one for one in self.processes() if "prefect.server.api.server" in _command_of(one)]

    def _serve(self, port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
        shared = {"PREFECT_HOME": str(self._folder / "prefect")}
        with (self._folder / "prefect.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment() | shared)

    def _environment(self) -> dict[str, str]:
        own = self.home / "prefect"
        ours = {
            _MARK: self._mark,
            "MOE_REPLAY_HOME": str(self.home),
            "PREFECT_HOME": str(own),
            "PREFECT_SERVER_MEMO_STORE_PATH": str(own / "memo_store.toml"),
            "MLFLOW_TRACKING_URI": self._mlflow,
        }
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | ours
        prefect = f"http://127.0.0.1:{self._server[1]}/api" if self._server else self._prefect
        return environment | ({"PREFECT_API_URL": prefect} if prefect else {})

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def kill(pid: int) -> None:
    """SIGKILL; nothing happens when the process is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
