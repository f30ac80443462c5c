"""Which failures Prefect may retry, and who hears of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

TRANSIENT = (ConnectionError, TimeoutError)
"""Failures of others that a later attempt may not meet; Prefect's own time-outs are among them."""

RetryListener = Callable[[str], None]
"""Called with what failed and why, where it is tried again."""

_listeners: list[RetryListener] = []


@contextmanager
def hearing_retries(listener: RetryListener) -> Iterator[None]:
    """Have `listener` told of each task of this process that is tried again."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether the error says of itself that another attempt may succeed; all else fails at once.

    Prefect asks as long as there are attempts left, so that yes means another.
    """
    error = state.result(raise_on_failure=False)
    if not (getattr(error, "transient", False) or isinstance(error, TRANSIENT)):
        return False
    for listener in _listeners:
        listener(
            f"{task_run.name} is tried again, attempt {task_run.run_count + 1} of {(task.retries or 0) + 1}: {error}"
        )
    return True
