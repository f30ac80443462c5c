"""What stages tell Prefect's event stream, so that an automation can tell a run that stalled from one at work.

An event is handed to a thread of Prefect's, so that a server that is away neither fails nor holds up a stage. It is of
the flow run that the stage is part of, whose own events say when nothing more is to be expected.

Two stages of one flow run may be at work, and an automation waits for a flow run, not for a stage. So a flow run makes
progress only when all its stages do, and one that finishes leaves no other unwatched.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from prefect.events import Event, emit_event
from prefect.runtime import flow_run

STAGE = "moe-replay.stage"
"""Events are `moe-replay.stage.started`, `.progressed` and `.finished`; the payload has run, stage, iteration and
`beside`, the other stages of the flow run that are at work."""

EVENT_EVERY_SECONDS = 60.0
"""A stage that makes progress says so at most that often."""


class _Stage(NamedTuple):
    run_id: str
    stage: str
    iteration: int


_lock = threading.Lock()
_heard: dict[str, dict[_Stage, bool]] = {}
"""Stages at work in this process, by flow run; whether they made progress since the flow run's last event."""


def tell_progress(run_id: str, stage: str, iteration: int) -> None:
    """Emit that a stage made progress, as soon as all that work beside it did too since the flow run's last event."""
    told = _Stage(run_id, stage, iteration)
    with _lock:
        at_work = _heard.get(str(flow_run.id), {})
        if told in at_work:
            at_work[told] = True
        if all(at_work.values()):
            _emit("progressed", told, at_work)


@contextmanager
def telling_stage(run_id: str, stage: str, iteration: int) -> Iterator[None]:
    """Emit that a stage starts, and that it is finished unless it fails: then the flow run's own state says so."""
    told = _Stage(run_id, stage, iteration)
    with _lock:
        at_work = _heard.setdefault(str(flow_run.id), {})
        at_work[told] = False
        _emit("started", told, at_work)
    finished = False
    try:
        yield
        finished = True
    finally:
        with _lock:
            del at_work[told]
            if not at_work:
                del _heard[str(flow_run.id)]
            if finished:
                last = _emit("finished", told, at_work)
                # What is finished ends the wait for the flow run: another begins, for what is still at work.
                if at_work:
                    _emit("progressed", next(iter(at_work)), at_work, follows=last)


def _emit(
    what: Literal["started", "progressed", "finished"],
    told: _Stage,
    at_work: dict[_Stage, bool],
    follows: Event | None = None,
) -> Event | None:
    for stage in at_work:
        at_work[stage] = False
    return emit_event(
        f"{STAGE}.{what}",
        resource={
            "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
            "prefect.resource.name": str(flow_run.name),
        },
        payload={
            "run": told.run_id,
            "stage": told.stage,
            "iteration": told.iteration,
            "beside": [f"{other.stage} of iteration {other.iteration}" for other in at_work if other != told],
        },
        follows=follows,
    )
