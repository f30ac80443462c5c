"""An engine in a process of its own.

verl and vLLM keep global state (process groups, seeds, thread pools) and can take their process down with them. Held
at arm's length an engine is a cache: it can die, be killed or be replaced, and the flow that drives it goes on.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from moe_replay.engines.memory import ran_out_of_memory
from moe_replay.errors import EngineFailed, EngineLost, EngineStopped, OutOfMemory, ReplayError

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) while a stage works."""

_STOP_SECONDS = 3.0
_PARENT_POLL_SECONDS = 1.0
_LEAVE = None


def no_progress(done: int, total: int, what: str) -> None:
    """Report nothing."""


class EngineProcess:
    """Builds `build(*arguments)` in a spawned process and runs functions on it, one at a time.

    The child's output goes to `log`. It leads a process group of its own, so that whatever the engine starts is ended
    with it, and it ends itself when this process is gone.
    """

    def __init__(self, build: str, arguments: tuple[Any, ...], name: str, log: Path, environment: dict[str, str]):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(build, arguments, theirs, log, environment, os.getpid()), name=name
        )
        self._process.start()
        theirs.close()
        self._idle = True
        self._broken_off = False
        self._stopped = False

    @property
    def pid(self) -> int:
        """Process id of the engine, which is its process group's too."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can take a call: the process runs, and no call to it was broken off."""
        return self._process.is_alive() and not self._broken_off

    def call(self, function: str, progress: Progress, *args: Any) -> Any:
        """Run `function(engine, progress, *args)` in the engine's process and return its result.

        The function is named as `package.module:name`, so that this process need not import what the engine needs.

        Raises:
            EngineLost: the process died; its log says why. Or a call before this one was broken off by an exception
                of `progress` or from outside: the engine is still at that work, and its next answer belongs to it.
            EngineStopped: another thread stopped the engine before or during the call.
            ReplayError: what the function, or the building of the engine, raised of ours.
            OutOfMemory: an allocation failed; the engine may hold half of what it was making.
            EngineFailed: what it raised besides.
        """
        if self._broken_off and self._process.is_alive():
            raise EngineLost(
                f"the {self.name} engine (process {self.pid}) takes no calls after one that was broken off: it is "
                "still at that work; stop it and start a fresh one"
            )
        self._idle = False
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.send((function, args))
            kind, payload = self._answer(progress)
            if kind == "result":
                return payload
            raise payload if kind == "error" else self._failure(kind, payload)
        except (EOFError, OSError) as error:
            if self._stopped:
                raise EngineStopped(f"the {self.name} engine was stopped while at work") from error
            if isinstance(error, (EOFError, ConnectionResetError)):
                raise self._lost() from error
            raise
        finally:
            self._broken_off = not self._idle

    def stop(self) -> None:
        """End the engine and everything it started. Harmless when it is gone already.

        A call that another thread has it work on ends with EngineStopped.
        """
        self._stopped = True
        if self._idle:
            # An engine at rest leaves by itself when it is told, and cleans up.
            with contextlib.suppress(OSError):
                self._connection.send(_LEAVE)
            self._process.join(_STOP_SECONDS)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            self._process.join(_STOP_SECONDS)
        # Last, for another thread may be reading from it until the process is gone.
        self._connection.close()

    def _answer(self, progress: Progress) -> tuple[str, Any]:
        """Kind and content of what comes of a call, after the progress that is told before it."""
        while (news := self._receive())[0] == "progress":
            progress(*news[1])
        self._idle = True
        return news

    def _failure(self, kind: str, told: str) -> EngineFailed | OutOfMemory:
        """An error in the engine that is none of ours."""
        if kind == "memory":
            return OutOfMemory(f"the {self.name} engine ran out of memory: {told}; its log is {self.log}")
        return EngineFailed(f"the {self.name} engine failed: {told}; the traceback is in {self.log}")

    def _receive(self) -> tuple[str, Any]:
        # Waiting in short turns lets Prefect's time-outs and cancellations reach this thread.
        while not (ready := wait([self._connection, self._process.sentinel], timeout=0.5)):
            pass
        if self._connection in ready or self._connection.poll():
            return self._connection.recv()
        raise EOFError

    def _lost(self) -> EngineLost:
        self._process.join(_STOP_SECONDS)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:]) if self.log.exists() else ""
        return EngineLost(
            f"the {self.name} engine (process {self.pid}) ended with exit code {self._process.exitcode} while at work; "
            f"a retry starts a fresh one. {f'End of its log {self.log}:' if tail else f'Its log {self.log} is empty'}"
            + (f"\n{tail}" if tail else "")
        )


def _serve(
    build: str, arguments: tuple[Any, ...], connection: Connection, log: Path, environment: dict[str, str], parent: int
) -> None:
    os.setpgid(0, 0)
    for variable, value in environment.items():
        os.environ.setdefault(variable, value)  # what the user has set stays
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _write_to(log)
    try:
        with _nameless_semaphores():
            engine = resolve_name(build)(*arguments)
    except BaseException as error:
        _answer_error(connection, error)
        raise
    while True:
        try:
            call = connection.recv()
        except (EOFError, ConnectionResetError):
            # The driver went without a word: it was killed, and nobody else ends what this engine started.
            os.killpg(0, signal.SIGKILL)
            return
        if call is _LEAVE:
            _leave()
        function, args = call
        try:
            result = resolve_name(function)(engine, lambda *news: connection.send(("progress", news)), *args)
            connection.send(("result", result))
        except Exception as error:
            _answer_error(connection, error)


@contextlib.contextmanager
def _nameless_semaphores() -> Iterator[None]:
    """Have semaphores that libraries make for this process alone, as vLLM and tqdm do, be gone when it is killed.

    In a spawned process they are named, for processes that it spawns in turn, and outlive it: the driver's resource
    tracker removes and tells of them. Under the method `fork` a name goes as soon as its semaphore is made. What hands
    semaphores to processes that it spawns has a context of its own. Not run on a GPU yet.
    """
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _leave() -> None:
    """End cleaned up, but at once: an interpreter that holds torch needs seconds to take itself apart."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _answer_error(connection: Connection, error: BaseException) -> None:
    """Send the error itself where it is one of ours, else its text: an engine's own errors need not unpickle."""
    traceback.print_exc()
    sys.stderr.flush()
    text = "".join(traceback.format_exception_only(error)).strip()
    kind = "memory" if ran_out_of_memory(error) else "failure"
    with contextlib.suppress(OSError):
        connection.send(("error", error) if isinstance(error, ReplayError) else (kind, text))


def _write_to(log: Path) -> None:
    """Point this process's output, the engine's children included, at the log file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")


def _end_with_parent(parent: int) -> None:
    """End the whole group once the driving process is gone: SIGKILL gives it no chance to say goodbye."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)
