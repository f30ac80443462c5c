"""Which failures Prefect may retry, and who hears of them."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from tasks.listeners import Listeners

TRANSIENT = (ConnectionError, TimeoutError)
"""Failures of others that a later attempt may not meet; Prefect's own time-outs are among them."""

_retries = Listeners[[str]]()
hearing_retries = _retries.hearing
"""Has a listener called with what failed and why, where a task of this process is tried again."""


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether the error says of itself that another attempt may succeed; all else fails at once.

    Prefect asks as long as there are attempts left, so that yes means another.
    """
    error = state.result(raise_on_failure=False)
    if not (getattr(error, "transient", False) or isinstance(error, TRANSIENT)):
        return False
    _retries.tell(
        f"{task_run.name} is tried again, attempt {task_run.run_count + 1} of {(task.retries or 0) + 1}: {error}"
    )
    return True
