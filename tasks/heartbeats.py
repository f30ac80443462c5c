"""Signs of life of the flow runs inside a run, which tell those whose process was killed (`tasks/alerts.py`).

Prefect's come from a thread that looks once a second whether its flow has ended, and the flow waits for that thread: an
iteration would last whole seconds. Ours ends at once.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

HEARTBEAT = "prefect.flow-run.heartbeat"
"""Prefect's own name of the event."""

_seconds: ContextVar[int | None] = ContextVar("seconds", default=None)
"""Between two heartbeats, as Prefect's settings have it; none where there shall be none."""


@contextmanager
def taking_over_heartbeats() -> Iterator[None]:
    """Flow runs that start within this block leave their heartbeats to `sending_heartbeats`."""
    before = _seconds.set(get_current_settings().flows.heartbeat_frequency)
    try:
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        _seconds.reset(before)


@contextmanager
def sending_heartbeats() -> Iterator[None]:
    """Send the heartbeats of the flow run that this block is the body of, where they were taken over."""
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": str(flow_run.name)}
    ended = threading.Event()

    def send() -> None:
        # Handed to a thread of Prefect's, which adds what the flow run is related to.
        emit_event(HEARTBEAT, resource)
        while not ended.wait(seconds):
            emit_event(HEARTBEAT, resource)

    sender = threading.Thread(target=copy_context().run, args=(send,), daemon=True)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        # Else one that is about to be sent would come after the end.
        sender.join()
