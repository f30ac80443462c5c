"""Interrupts that libraries lose on the way.

An interrupt may come at any point of what Prefect, MLflow or a progress report do, and they may turn it into an
ordinary error of their own, which passes for a failed run, or drop it, so that the run goes on as if nobody had pressed
Ctrl-C. While a command is `interruptible` an interrupt is remembered, and comes back where work would go on without it.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = threading.Event()
_last_raised = float("-inf")
_ONE_INTERRUPT_SECONDS = 2.0
"""Ctrl-C pressed again within them is the same one: raised once more, it would break off what ends because of it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Leave with KeyboardInterrupt when an interrupt came inside, whatever was made of it. For the main thread.

    SIGTERM, with which schedulers and containers end a process, is an interrupt too.
    """
    global _last_raised
    _last_raised = float("-inf")
    before = {number: signal.signal(number, _remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with interrupts_kept():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _came.clear()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of what an interrupt became, and at the end where it became nothing."""
    try:
        yield
    except Exception as error:
        if _came.is_set():
            raise KeyboardInterrupt from error
        raise
    raise_lost_interrupt()


def raise_lost_interrupt() -> None:
    """Raise KeyboardInterrupt when an interrupt came and was dropped; call it before long work is begun."""
    if _came.is_set():
        raise KeyboardInterrupt


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _last_raised
    _came.set()
    now = time.monotonic()
    if now - _last_raised < _ONE_INTERRUPT_SECONDS:
        return
    _last_raised = now
    raise KeyboardInterrupt
