"""Names of runs and of their flow runs, where the parameters leave them to be made.

A name is made from the flow run's own id, so that a retried flow run goes on with what it began.
"""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.runtime import flow_run

from moe_replay.evaluations import EvaluationRequest


def own_run_id() -> str:
    """The run that this flow run trains."""
    return run_id_of(flow_run.parameters, str(flow_run.id))


def run_id_of(parameters: Mapping[str, Any], flow_run_id: UUID | str) -> str:
    """The `run_id` that a flow run was given, else `run-` and the start of its own id."""
    return parameters.get("run_id") or f"run-{str(flow_run_id)[:8]}"


def own_comparison() -> str:
    """The `comparison` that the flow run was given, else `compare-` and the start of its own id."""
    return flow_run.parameters.get("comparison") or f"compare-{str(flow_run.id)[:8]}"


def training_name() -> str:
    """Name of a flow run that trains."""
    return f"train-{own_run_id()}"


def comparison_name() -> str:
    """Name of a flow run that compares."""
    return f"compare-{own_comparison().removeprefix('compare-')}"


def evaluation_name() -> str:
    """Name of a flow run that evaluates: the evaluation's id, or what it is of."""
    given = flow_run.parameters.get("request") or {}
    request = EvaluationRequest.model_validate(given)
    subject = request.run_id or (request.model.path if request.model else "embedded")
    at = "" if request.iteration is None else f"@{request.iteration}"
    return f"evaluate-{flow_run.parameters.get('evaluation_id') or subject}{at}"
