"""Stability alarms as people meet them: in the log, in the Prefect UI, as events, as a form, and in this process."""

import time
from typing import Any, Literal
from uuid import UUID, uuid4

from httpx import HTTPStatusError, TransportError
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput, keyset_from_base_key
from prefect.input.actions import read_flow_run_input
from prefect.runtime import flow_run
from pydantic import Field, create_model

from moe_replay.alarm import Action
from moe_replay.stages.decisions import Alarm
from moe_replay.stages.run import Run
from tasks.engines import engines_of
from tasks.listeners import Listeners
from tasks.progress import artifact_key

EVENT = "moe-replay.stability-alarm"
"""Event of an alarm, for automations; `run`, `iteration`, `metric`, `value`, `bound` are in its payload."""

_POLL_SECONDS = 3
_MEANINGS: dict[Action, str] = {
    "train": "train on the batch all the same",
    "skip": "leave the batch out: the policy stays as it is",
    "lower_lr": "train on it with the learning rate times `alarm.lr_factor`",
    "fall_back": "train on it under the routes of the rollout, as r3 does",
}
_alarms = Listeners[[str]]()
hearing_alarms = _alarms.hearing
"""Has a listener called with what an alarm of this process saw, and what is done about it."""


def announce(run: Run, alarm: Alarm) -> None:
    """Emit the event of an alarm."""
    emit_event(
        EVENT,
        resource={"prefect.resource.id": f"moe-replay.run.{run.run_id}", "prefect.resource.name": run.run_id},
        payload={"run": run.run_id, **alarm.model_dump(include={"iteration", "metric", "value", "bound"})},
    )


def report(run: Run, alarm: Alarm, outcome: str) -> None:
    """Tell listeners, the log and the Prefect UI what was seen and what comes of it."""
    told = f"iteration {alarm.iteration}: {alarm.reason}: {outcome}"
    _alarms.tell(told)
    get_run_logger().warning("stability alarm: %s", told)
    try:
        create_markdown_artifact(
            key=artifact_key("alarm", run.run_id, str(alarm.iteration)),
            markdown=f"# Stability alarm\n\nRun `{run.run_id}`, iteration {alarm.iteration}\n\n{alarm.reason}\n\n"
            f"**{outcome}**\n",
            description=outcome,
        )
    except Exception as error:
        get_run_logger().warning("the alarm could not be shown in the UI (%s)", type(error).__name__)


def is_deployed() -> bool:
    """Whether this flow run, or the one that it is part of, was started from a deployment."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(str(flow_run.root_flow_run_id))).deployment_id is not None


def ask(run: Run, alarm: Alarm) -> Action:
    """Pause this flow run until somebody resumes it with a decision; engines give back their memory meanwhile.

    A Prefect server that is away meanwhile is waited for. Raises FlowPauseTimeout when nobody decided within
    `alarm.wait_seconds`.
    """
    engines_of(run).close()
    form, seconds = decision_form(run, alarm), run.config.alarm.wait_seconds
    deadline = time.monotonic() + seconds
    # Prefect's own keys count the pauses of a process: after a killed one, the first would count as answered.
    key = uuid4().hex
    answer: Any
    try:
        answer = pause_flow_run(form, timeout=seconds, poll_interval=_POLL_SECONDS, key=key)
    except (TransportError, HTTPStatusError) as error:
        answer = _answer_after(error, form, key, deadline)
        if answer is None:
            raise
    return answer.decision


def _answer_after(
    error: TransportError | HTTPStatusError, form: type[RunInput], key: str, deadline: float
) -> RunInput | None:
    """The answer to a pause after an outage of the server; none where it was no outage, or came before the pause.

    Raises FlowPauseTimeout when nobody answered until the `deadline`.
    """
    if not _is_outage(error):
        return None
    get_run_logger().warning("Prefect does not answer (%s); still waiting for a decision", type(error).__name__)
    keyset = keyset_from_base_key(f"paused-{key}")
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(UUID(str(flow_run.id))).state
            if state and state.is_running():
                return None if read_flow_run_input(keyset["response"]) is None else form.load(keyset)
        except (TransportError, HTTPStatusError) as later:
            if not _is_outage(later):
                raise
    raise FlowPauseTimeout("the flow run was paused and never resumed")


def _is_outage(error: TransportError | HTTPStatusError) -> bool:
    return isinstance(error, TransportError) or error.response.is_server_error


def decision_form(run: Run, alarm: Alarm) -> type[RunInput]:
    """What the Prefect UI asks, with what can be done in this case and why it is asked."""
    actions = alarm.actions(run.config.method)
    choices = "\n".join(f"- `{action}`: {_MEANINGS[action]}" for action in actions)
    field = (Literal[actions], Field(description="What becomes of the batch"))
    form = create_model("Decision", __base__=RunInput, decision=field)
    return form.with_initial_data(
        description=f"# Stability alarm\n\nRun `{run.run_id}` paused before iteration {alarm.iteration} trained: "
        f"{alarm.reason}.\n\n{choices}"
    )
