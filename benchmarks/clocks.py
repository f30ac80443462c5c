"""Where a process's time goes: the seconds inside functions that are watched, each without those watched within it.

Only the main thread is watched: what another thread does beside it costs an iteration nothing until it is waited for.
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
_inner: list[float] = []
"""Seconds spent in watched functions within each that is running, the outermost first."""


def watch(engine: object, progress: object, functions: dict[str, str]) -> None:
    """Time functions, named as `package.module:name` or `package.module:class.name`, under the label given for each.

    The first two arguments make it callable in an engine's process.
    """
    for name, label in functions.items():
        owner_name, _, attribute = name.rpartition("." if "." in name.rpartition(":")[2] else ":")
        owner = resolve_name(owner_name)
        stored = inspect.getattr_static(owner, attribute)
        if isinstance(stored, classmethod):
            setattr(owner, attribute, classmethod(timed(stored.__func__, label)))
        else:
            setattr(owner, attribute, timed(stored, label))


def timed(function: Callable, label: str) -> Callable:
    """The function, its time kept under `label`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        _inner.append(0.0)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            _spans.append((label, time.time(), seconds - _inner.pop()))
            if _inner:
                _inner[-1] += seconds

    return wrapper


def note(label: str, seconds: float) -> None:
    """Keep a time that just ended and was taken elsewhere."""
    _spans.append((label, time.time(), seconds))
    if _inner:
        _inner[-1] += seconds


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
