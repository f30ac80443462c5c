"""What `test_process.py` has engines do; imported by name in their processes."""

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moe_replay.engines.process import Progress
from moe_replay.errors import RoutingMismatch


class Counter:
    """An engine that keeps something between calls."""

    def __init__(self, start: int):
        print("counter built")
        self.value = start


class Broken:
    """An engine that can't be built."""

    def __init__(self, rows: int):
        raise RoutingMismatch(f"routes cover {rows} rows")


class Locked(Counter):
    """An engine of a library that makes a lock for its own process, as vLLM does."""

    def __init__(self, start: int):
        super().__init__(start)
        self.lock = multiprocessing.Lock()


class ForeignError(Exception):
    """An error that can't be rebuilt from its pickle: it takes two arguments and remembers one."""

    def __init__(self, what: str, code: int):
        super().__init__(f"{what} failed with {code}")


def add(counter: Counter, progress: Progress, amount: int) -> int:
    counter.value += amount
    return counter.value


def report(counter: Counter, progress: Progress, total: int) -> str:
    for done in range(total):
        progress(done, total, f"part {done}")
    return "done"


def leave_word(counter: Counter, progress: Progress, path: Path) -> None:
    """Have the process write a file when it ends of itself."""
    atexit.register(path.write_text, "cleaned up")


def mismatch(counter: Counter, progress: Progress) -> None:
    raise RoutingMismatch("routes cover 3 rows")


def fail(counter: Counter, progress: Progress) -> None:
    raise ForeignError("the kernel", 7)


def exhaust(counter: Counter, progress: Progress) -> None:
    bytearray(1 << 60)


def unpicklable(counter: Counter, progress: Progress) -> Any:
    return lambda: None


def talk(counter: Counter, progress: Progress) -> None:
    print("said by the engine")
    subprocess.run([sys.executable, "-c", "print('said by its child')"], check=True)
    os.write(2, b"said by native code\n")


def sleep(counter: Counter, progress: Progress, seconds: float) -> None:
    print("going to sleep")
    progress(0, 1, "asleep")
    time.sleep(seconds)


def leave(counter: Counter, progress: Progress, code: int) -> None:
    print("leaving in the middle of work")
    sys.stdout.flush()
    os._exit(code)


def start_stubborn_child(counter: Counter, progress: Progress) -> int:
    """Start a process that ignores SIGTERM; returns its id once it does."""
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True)\n"
    child = subprocess.Popen([sys.executable, "-c", program + "time.sleep(600)"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


def drive(log: str, then: str) -> None:
    """A driving process: prints the ids of its engine and of the engine's child; the engine works or rests after it."""
    from moe_replay.engines.process import EngineProcess, no_progress

    engine = EngineProcess("process_calls:Counter", (0,), "counter", Path(log), {})
    child = engine.call("process_calls:start_stubborn_child", no_progress)
    print(engine.pid, child, flush=True)
    if then == "work":
        engine.call("process_calls:sleep", no_progress, 600)
    time.sleep(600)


def environment(counter: Counter, progress: Progress, name: str) -> str | None:
    return os.environ.get(name)


def interrupt(log: str) -> None:
    """A driving process that stops its engine at work."""
    from moe_replay.engines.process import EngineProcess

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    engine = EngineProcess("process_calls:Locked", (0,), "counter", Path(log), {})
    with contextlib.suppress(KeyboardInterrupt):
        engine.call("process_calls:sleep", interrupted, 600)
    engine.stop()
