"""Which failures Prefect may retry."""

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

TRANSIENT = (ConnectionError, TimeoutError)
"""Failures of others that a later attempt may not meet; Prefect's own time-outs are among them."""


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether the error says of itself that another attempt may succeed; all else fails at once."""
    error = state.result(raise_on_failure=False)
    return bool(getattr(error, "transient", False)) or isinstance(error, TRANSIENT)
