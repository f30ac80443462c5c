"""What the local stack remembers between commands, and which processes are its own."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, Field, ValidationError

from moe_replay.errors import ConfigError

_MARK = "MOE_REPLAY_STACK"
_POLITE_SECONDS = 20.0
_LEFT_BEHIND_SECONDS = 10.0


class Stack(BaseModel):
    """The stack of one home: its keys, its ports and the process that leads each service."""

    mark: str = Field(default_factory=lambda: secrets.token_hex(16))
    """Stands in the environment of every process that the stack starts, and of those that these start."""
    access_key: str = Field(default_factory=lambda: secrets.token_hex(10))
    secret_key: str = Field(default_factory=lambda: secrets.token_urlsafe(30))
    ports: dict[str, int] = {}
    pids: dict[str, int] = {}

    def marked(self, service: str) -> dict[str, str]:
        """The environment variable by which processes of the service are known."""
        return {_MARK: f"{self.mark}:{service}"}

    def leader(self, service: str) -> psutil.Process | None:
        """The process that was started for the service, while it lives.

        A recorded pid may by now be a stranger's, after a reboot for example: it counts only with our mark.
        """
        with suppress(psutil.Error, KeyError):
            process = psutil.Process(self.pids[service])
            if self._belongs(process, service):
                return process
        return None

    def processes(self, service: str) -> list[psutil.Process]:
        """All processes of the service, also those whose leader is gone."""
        return [process for process in psutil.process_iter() if self._belongs(process, service)]

    def stop(self, service: str) -> bool:
        """End the service with all that it started, politely first; returns whether there was anything to end."""
        leader = self.leader(service)
        found = self.processes(service)
        if leader is not None:
            # Alone at first: a worker has to tell its flow runs, and the server how they ended.
            _signal([leader], psutil.Process.terminate)
            psutil.wait_procs([leader], _POLITE_SECONDS)
        for end in (psutil.Process.terminate, psutil.Process.kill):
            left = self.processes(service)
            _signal(left, end)
            psutil.wait_procs(left, _LEFT_BEHIND_SECONDS)
        self.pids.pop(service, None)
        return bool(found)

    def _belongs(self, process: psutil.Process, service: str) -> bool:
        try:
            return process.environ().get(_MARK) == f"{self.mark}:{service}"
        except (psutil.Error, OSError):
            # Gone, a zombie, or another user's.
            return False


@contextmanager
def stack_of(home: Path) -> Iterator[Stack]:
    """The stack of `home`, for one command at a time; `save` it before what it tells becomes true.

    Raises ConfigError when another command holds it or its file can't be read.
    """
    folder(home).mkdir(parents=True, exist_ok=True)
    with (folder(home) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another command starts or stops the stack of {home}; wait until it is done") from None
        yield read(home)


def folder(home: Path) -> Path:
    """Where the stack's own files lie."""
    return home / "stack"


def read(home: Path) -> Stack:
    """The stack as last saved; a new one where there is none."""
    path = folder(home) / "stack.json"
    try:
        return Stack.model_validate_json(path.read_text())
    except FileNotFoundError:
        return Stack()
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path} does not describe a stack ({type(error).__name__}); end what still runs and remove the file"
        ) from None


def save(home: Path, stack: Stack) -> None:
    """Remember the stack."""
    write_secret(folder(home) / "stack.json", stack.model_dump_json(indent=2))


def write_secret(path: Path, text: str) -> None:
    """Put `text` in the place of the file, whole or not at all, for its owner's eyes alone."""
    beside = path.with_suffix(".new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    beside.rename(path)


def _signal(processes: list[psutil.Process], signal) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            signal(process)
