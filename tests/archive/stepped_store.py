"""Writers that take turns at every request to one in-memory store, in an order that a test chooses."""

import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from moe_replay.archive.artifacts import RunStore

PROTOCOLS = {True: "stepped", False: "steppedplain"}
"""By whether the store puts conditionally."""


class Killed(BaseException):
    """The writer was killed before a request."""


class Turns:
    """Lets one of several threads at a time make one request."""

    current: "Turns | None" = None

    def __init__(self, writers: Sequence[Callable[[], object]]) -> None:
        self._threads = [threading.Thread(target=self._run, args=(n, writer)) for n, writer in enumerate(writers)]
        self._may_go = [threading.Semaphore(0) for _ in writers]
        self._stopped = [threading.Semaphore(0) for _ in writers]
        self._killed = [False] * len(writers)
        self._numbers: dict[int, int] = {}
        self.results: list[object] = [None] * len(writers)
        self.requests = 0
        """Made by all so far: a clock."""

    def play(self, schedule: Sequence[int], killed_after: dict[int, int]) -> list[object]:
        """Each entry of `schedule` gives that writer one request; then all run to their ends in turn.

        Writer n is killed after `killed_after[n]` requests. Returns what each returned or raised.
        """
        Turns.current = self
        for n, thread in enumerate(self._threads):
            thread.start()
            self._stopped[n].acquire()
        made = [0] * len(self._threads)
        rest = [n for n in range(len(self._threads)) for _ in range(1000)]
        for n in [*schedule, *rest]:
            if self._threads[n].is_alive() and n in self._numbers.values():
                # The dead make no more requests, whatever they would clean up.
                self._killed[n] = killed_after.get(n, sys.maxsize) <= made[n]
                made[n] += 1
                self._may_go[n].release()
                self._stopped[n].acquire()
        for thread in self._threads:
            thread.join()
        Turns.current = None
        return self.results

    def wait(self) -> None:
        """Called before every request: stop here until it is this thread's turn. Other threads just go on."""
        n = self._numbers.get(threading.get_ident())
        if n is None:
            return
        self._stopped[n].release()
        self._may_go[n].acquire()
        if self._killed[n]:
            raise Killed
        self.requests += 1

    def _run(self, n: int, writer: Callable[[], object]) -> None:
        self._numbers[threading.get_ident()] = n
        try:
            self.results[n] = writer()
        except BaseException as error:
            self.results[n] = error
        finally:
            del self._numbers[threading.get_ident()]
            self._stopped[n].release()


class SteppedFileSystem(MemoryFileSystem):
    """An in-memory store whose every request waits for its turn; puts conditionally, in one step, as S3 does."""

    protocol = "stepped"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    puts_conditionally = True
    _finding = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace(f"{cls.protocol}://", "memory://"))

    def unstrip_protocol(self, name):
        return f"{self.protocol}:/{name}"

    def cat_file(self, path, start=None, end=None, **kwargs):
        _wait()
        return super().cat_file(path, start, end)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        _wait()
        return super().pipe_file(path, value, mode if self.puts_conditionally else "overwrite")

    def ls(self, path, detail=True, **kwargs):
        # Those that `find` makes are parts of one request.
        if not self._finding:
            _wait()
        return super().ls(path, detail, **kwargs)

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        _wait()
        self._finding = True
        try:
            return super().find(path, maxdepth, withdirs, detail)
        finally:
            self._finding = False

    def rm_file(self, path):
        _wait()
        return super().rm_file(path)


class PlainSteppedFileSystem(SteppedFileSystem):
    """The same without conditional put: a put overwrites, whatever was asked."""

    protocol = "steppedplain"
    store: ClassVar[dict] = {}
    puts_conditionally = False


def _wait() -> None:
    if Turns.current is not None:
        Turns.current.wait()


fsspec.register_implementation("stepped", SteppedFileSystem)
fsspec.register_implementation("steppedplain", PlainSteppedFileSystem)


def stepped_run(puts_conditionally: bool) -> RunStore:
    """A run in a store of its own."""
    return RunStore(f"{PROTOCOLS[puts_conditionally]}://{uuid.uuid4().hex}", "run-1")
