"""Names of runs and of their flow runs, where the parameters leave them to be made.

A name is made from the flow run's own id, so that a retried flow run goes on with what it began.
"""

from prefect.runtime import flow_run

from moe_replay.evaluations import EvaluationRequest


def own_run_id() -> str:
    """The `run_id` that the flow run was given, else `run-` and the start of its own id."""
    return flow_run.parameters.get("run_id") or f"run-{_own_id()}"


def own_comparison() -> str:
    """The `comparison` that the flow run was given, else `compare-` and the start of its own id."""
    return flow_run.parameters.get("comparison") or f"compare-{_own_id()}"


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


def _own_id() -> str:
    return str(flow_run.id)[:8]
