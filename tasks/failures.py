"""The log line of a flow run that failed: why, and how to go on."""

from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger

from moe_replay.places import as_argument
from tasks.naming import run_id_of


def log_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Log the reason and the command that continues the flow run."""
    reason = state.message or "no reason was given"
    flow_run_logger(flow_run, flow).error("%s: %s; to go on: %s", state.name, reason, way_on(flow.name, flow_run))


def way_on(flow: str, flow_run: FlowRun) -> str:
    """What continues the flow run at its first stage without a commit."""
    run_id = run_id_of(flow_run.parameters, flow_run.id)
    # A flow run whose process never began has the name that Prefect gave it, and has made no run of its own.
    began = flow_run.name == f"train-{run_id}"
    if flow != "train" or not (began or flow_run.parameters.get("run_id")):
        return "retry it in the Prefect UI"
    storage = (flow_run.parameters.get("config") or {}).get("storage") or {}
    return f"moe-replay resume {as_argument(run_id, storage.get('root'))}, or retry it in the Prefect UI"


LOGGED_FAILURES: dict[str, Any] = {"on_failure": [log_failure], "on_crashed": [log_failure]}
"""Options of a flow whose failures are logged so."""
