"""Where a process's time goes: the seconds inside functions that are watched, each without those watched within it.

What a thread does beside the main one costs an iteration nothing until it is waited for, so it is left out unless asked
for: a flow has threads for the stages that it waits for.
"""

import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import Any

Span = tuple[str, float, float]
"""Label, when it ended (seconds since 1970, as other processes have it), seconds."""

_spans: list[Span] = []
_of_thread = threading.local()


def watch(
    engine: object, progress: object, functions: dict[str, str], in_threads: bool = False, whole: bool = False
) -> None:
    """Time functions, named as `package.module:name` or `package.module:class.name`, under the label given for each.

    A function timed `whole` keeps the time of what is watched within it.

    The first two arguments make it callable in an engine's process.
    """
    for name, label in functions.items():
        owner_name, _, attribute = name.rpartition("." if "." in name.rpartition(":")[2] else ":")
        owner = resolve_name(owner_name)
        stored = inspect.getattr_static(owner, attribute)
        if isinstance(stored, classmethod):
            setattr(owner, attribute, classmethod(timed(stored.__func__, label, in_threads, whole)))
        else:
            setattr(owner, attribute, timed(stored, label, in_threads, whole))


def timed(function: Callable, label: str, in_threads: bool = False, whole: bool = False) -> Callable:
    """The function, its time kept under `label`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and not in_threads:
            return function(*args, **kwargs)
        inner = _inner()
        if inner and inner[-1] is None:
            return function(*args, **kwargs)
        inner.append(None if whole else 0.0)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            _spans.append((label, time.time(), seconds - (inner.pop() or 0.0)))
            if inner and inner[-1] is not None:
                inner[-1] += seconds

    return wrapper


def _inner() -> list[float | None]:
    """Seconds in watched functions within each that this thread runs, the outermost first; none in one timed whole."""
    if not hasattr(_of_thread, "inner"):
        _of_thread.inner = []
    return _of_thread.inner


def note(label: str, seconds: float) -> None:
    """Keep a time that just ended and was taken elsewhere."""
    _spans.append((label, time.time(), seconds))
    if (inner := _inner()) and inner[-1] is not None:
        inner[-1] += seconds


def take(engine: object, progress: object) -> list[Span]:
    """What was watched in this process since the last time."""
    taken = _spans.copy()
    _spans.clear()
    return taken


def between(spans: Iterable[Span], start: float, stop: float) -> dict[str, float]:
    """Seconds by label of what ended after `start` and no later than `stop`."""
    seconds: dict[str, float] = {}
    for label, ended, taken in spans:
        if start < ended <= stop:
            seconds[label] = seconds.get(label, 0.0) + taken
    return seconds
