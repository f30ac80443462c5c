"""What stages tell Prefect's event stream, so that an automation can tell a run that stalled from one at work.

An event is handed to a thread of Prefect's, so that a server that is away neither fails nor holds up a stage. It is of
the flow run that the stage is part of, whose own events say when nothing more is to be expected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prefect.events import emit_event
from prefect.runtime import flow_run

STAGE = "moe-replay.stage"
"""Events are `moe-replay.stage.started`, `.progressed` and `.finished`; run, stage and iteration are in the payload."""

EVENT_EVERY_SECONDS = 60.0
"""A stage that makes progress says so at most that often."""


def tell_stage(what: Literal["started", "progressed", "finished"], run_id: str, stage: str, iteration: int) -> None:
    """Emit the event of a stage."""
    emit_event(
        f"{STAGE}.{what}",
        resource={
            "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
            "prefect.resource.name": str(flow_run.name),
        },
        payload={"run": run_id, "stage": stage, "iteration": iteration},
    )


@contextmanager
def telling_stage(run_id: str, stage: str, iteration: int) -> Iterator[None]:
    """Emit that a stage starts, and that it is finished unless it fails: then the flow run's own state says so."""
    tell_stage("started", run_id, stage, iteration)
    yield
    tell_stage("finished", run_id, stage, iteration)
