"""Signs of life of iterations, by which an automation finds the flow runs whose process was killed (`tasks.alerts`).

Prefect has the end of a flow run wait for the thread that sends its heartbeats, and that thread sleeps in whole
seconds: half a second on average, for each iteration. These end at once.
"""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

HEARTBEAT = "prefect.flow-run.heartbeat"
"""The event's name, which is Prefect's own."""
EVERY_SECONDS = 30.0


@contextmanager
def without_prefects() -> Iterator[None]:
    """Flow runs that are started within send none of Prefect's heartbeats."""
    with temporary_settings(restore_defaults={PREFECT_FLOWS_HEARTBEAT_FREQUENCY}):
        yield


@contextmanager
def beating() -> Iterator[None]:
    """Send the heartbeats of the flow run that this is called in."""
    ended = threading.Event()
    resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": str(flow_run.name)}

    def beat() -> None:
        emit_event(HEARTBEAT, resource=resource)
        while not ended.wait(EVERY_SECONDS):
            emit_event(HEARTBEAT, resource=resource)

    # In the flow run's context, from which Prefect takes which flow the event is related to.
    threading.Thread(target=contextvars.copy_context().run, args=(beat,), name="heartbeats", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
