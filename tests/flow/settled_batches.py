"""A batch that waits for a decision, and a flow that has it taken as the training loop does.

As a script, with a flow run's id and the run's root, this runs it in a process of its own.
"""

import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from predictor_samples import make_run
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow

from flows.stability import settle
from moe_replay.alarm import Excess
from moe_replay.errors import StabilityAlarm
from moe_replay.stages.decisions import BatchAlarms
from moe_replay.stages.run import Run

EXCESS = Excess("mismatch/kl_k3", 0.25, 0.125)
ITERATION = 2


def stopped(root: Path, **alarm: Any) -> tuple[Run, BatchAlarms]:
    """A batch that waits for a decision, for no longer than a test."""
    settings = {"wait_seconds": 300, **alarm}
    run = make_run(root, method="grpo", **{f"alarm__{key}": value for key, value in settings.items()})
    batch = BatchAlarms(run.store(), ITERATION, run.store().begin("rollout", ITERATION, {}, "d").commit())
    batch.raise_alarm(EXCESS)
    (root / "run").write_text(run.model_dump_json())
    return run, batch


@flow
def settled_alone(run: Run, batch: BatchAlarms) -> None:
    """Raises StabilityAlarm where nobody decides."""
    settle(run, batch, StabilityAlarm("the message", *EXCESS), None)


@flow
def settled_in_a_run_of_its_own(run: Run, batch: BatchAlarms) -> None:
    """As the loop does it: what is deployed is the parent."""
    settled_alone(run, batch)


def deployed(run_id: str) -> FlowRun:
    """A new run of the flow from a deployment."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(settled_in_a_run_of_its_own)
        return client.create_flow_run_from_deployment(client.create_deployment(flow_id, name=f"settle-{run_id}"))


def execute(flow_run: UUID, root: Path) -> Any:
    """Do what a worker has a process do for it; tests do it in a thread."""
    run = Run.model_validate_json((root / "run").read_text())
    rollout = run.store().commit_of("rollout", ITERATION)
    assert rollout is not None
    with get_client(sync_client=True) as client:
        known = client.read_flow_run(flow_run)
    parameters = {"run": run, "batch": BatchAlarms(run.store(), ITERATION, rollout)}
    return run_flow(settled_in_a_run_of_its_own, flow_run=known, parameters=parameters)


if __name__ == "__main__":
    execute(UUID(sys.argv[1]), Path(sys.argv[2]))
