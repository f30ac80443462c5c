"""Alerts as Prefect automations: the server itself watches flow runs, and calls a webhook.

Installing is idempotent: automations and the block with the webhook's URL are found by their names and updated.
"""

from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation, CallWebhook, ChangeFlowRunState, EventTrigger, Posture
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from moe_replay.errors import ConfigError
from tasks import stability
from tasks.events import EVENT_EVERY_SECONDS, STAGE
from tasks.heartbeats import HEARTBEAT

WEBHOOK_BLOCK = "moe-replay-alerts"
_WATCHED_FLOWS = ["train", "compare", "evaluate", "archive-gc"]
"""An iteration that fails fails its training, and is told once."""
_SHORTEST_STALL = timedelta(seconds=2 * EVENT_EVERY_SECONDS)
_MISSED_HEARTBEATS = timedelta(seconds=90)
"""Three of those that deployments send every 30 s (`prefect.yaml`)."""
_ENDS = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "TimedOut", "Cancelled")}
_RESTS = {f"prefect.flow-run.{name}" for name in ("Paused", "Suspended", "AwaitingRetry", "Cancelling")}
_ANY_FLOW_RUN = {"prefect.resource.id": "prefect.flow-run.*"}

# As `tasks.failures.way_on`: the name of a flow run whose process never began is one that Prefect made up.
_FAILED = """
{%- set name = event.resource['prefect.resource.name'] -%}
{%- set flow = event.resource_in_role['flow'].name -%}
{%- set state = event.resource['prefect.state-name'] -%}
{%- set reason = event.resource['prefect.state-message'] | default('', true) -%}
{%- set root = flow_run.parameters['config']['storage']['root'] -%}
{%- set given = flow_run.parameters['run_id'] -%}
{%- set run = given or 'run-' ~ (flow_run.id | string)[:8] -%}
{%- set command = 'moe-replay resume ' ~ run ~ (' --root ' ~ root if root else '') -%}
{%- set known = flow == 'train' and (given or name == 'train-' ~ run) -%}
{%- set resume = command if known else 'retry it in the Prefect UI' -%}
{"alert": {{ state | lower | tojson }}, "flow": {{ flow | tojson }}, "flow_run": {{ name | tojson }},
 "flow_run_id": {{ event.resource.id | tojson }}, "reason": {{ reason | tojson }}, "resume": {{ resume | tojson }},
 "text": {{ (name ~ ' is ' ~ state ~ ': ' ~ reason ~ ' To go on: ' ~ resume) | tojson }}}
"""
_STALLED = """
{%- set name = event.resource['prefect.resource.name'] -%}
{%- set told = event.payload['stage'] ~ ' of iteration ' ~ event.payload['iteration'] -%}
{%- set stage = ([told] + (event.payload['beside'] | default([]))) | join(' or ') -%}
{"alert": "stalled", "flow_run": {{ name | tojson }}, "flow_run_id": {{ event.resource.id | tojson }},
 "run": {{ event.payload['run'] | tojson }}, "stage": {{ stage | tojson }},
 "text": {{ (name ~ ' has stalled: nothing was heard of ' ~ stage ~ ' since ' ~ event.occurred) | tojson }}}
"""
_UNSTABLE = """
{%- set p = event.payload -%}
{%- set reason = p['metric'] ~ ' is ' ~ p['value'] ~ ', the bound is ' ~ p['bound'] -%}
{"alert": "stability", "run": {{ p['run'] | tojson }}, "iteration": {{ p['iteration'] | tojson }},
 "reason": {{ reason | tojson }},
 "text": {{ ('run ' ~ p['run'] ~ ', iteration ' ~ p['iteration'] ~ ': ' ~ reason) | tojson }}}
"""


def install_alerts(webhook: str | None, stalled_after: timedelta) -> list[str]:
    """Create or update the automations, and return their names.

    Without a `webhook` the one that was installed before is called; where there is none, only dead runs are marked.
    Raises ConfigError for a `stalled_after` that is shorter than what stages can keep to.
    """
    if stalled_after < _SHORTEST_STALL:
        raise ConfigError(
            f"a stage tells of its progress once in {EVENT_EVERY_SECONDS:.0f} s, so {stalled_after} without news is no "
            f"stall; give {_SHORTEST_STALL} or more"
        )
    automations = [_mark_dead()]
    if block := _webhook_block(webhook):
        automations += _notifying(block, stalled_after)
    for automation in automations:
        _install(automation)
    return [automation.name for automation in automations]


def _webhook_block(url: str | None) -> UUID | None:
    """The id of the block that keeps the URL, none where none was ever given."""
    if url is not None:
        headers = SecretDict({"Content-Type": "application/json"})
        return Webhook(url=SecretStr(url), headers=headers).save(WEBHOOK_BLOCK, overwrite=True)
    with get_client(sync_client=True) as client:
        try:
            return client.read_block_document_by_name(WEBHOOK_BLOCK, "webhook", include_secrets=False).id
        except ObjectNotFound:
            return None


def _mark_dead() -> Automation:
    """Prefect itself leaves a flow run in Running whose process and worker were killed."""
    trigger = EventTrigger(
        after={HEARTBEAT},
        expect={HEARTBEAT, *_ENDS, *_RESTS},
        match=_ANY_FLOW_RUN,
        # Others' flow runs on a shared server may send heartbeats more rarely.
        match_related=_of_flows(*_WATCHED_FLOWS, "iteration"),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=_MISSED_HEARTBEATS,
    )
    crash = ChangeFlowRunState(
        state=StateType.CRASHED,
        name="Crashed",
        message="no sign of life for 90 s; was its process killed?",
    )
    return Automation(name="moe-replay: dead flow runs become Crashed", trigger=trigger, actions=[crash])


def _notifying(block: UUID, stalled_after: timedelta) -> list[Automation]:
    failed = EventTrigger(
        expect={f"prefect.flow-run.{name}" for name in ("Failed", "Crashed", "TimedOut")},
        match=_ANY_FLOW_RUN,
        match_related=_of_flows(*_WATCHED_FLOWS),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    # A stage that is finished starts no wait: events of stages may reach the server after the end of their flow run.
    # For stages beside each other `tasks.events` sees to it that a flow run is heard of only when all of them are.
    stalled = EventTrigger(
        after={f"{STAGE}.started", f"{STAGE}.progressed"},
        expect={f"{STAGE}.*", *_ENDS, *_RESTS},
        match=_ANY_FLOW_RUN,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=stalled_after,
    )
    unstable = EventTrigger(expect={stability.EVENT}, posture=Posture.Reactive, threshold=1)
    calls = {
        "moe-replay: failed or crashed": (failed, _FAILED),
        "moe-replay: stalled": (stalled, _STALLED),
        "moe-replay: stability alarm": (unstable, _UNSTABLE),
    }
    return [
        Automation(name=name, trigger=trigger, actions=[CallWebhook(block_document_id=block, payload=payload.strip())])
        for name, (trigger, payload) in calls.items()
    ]


def _of_flows(*names: str) -> dict[str, str | list[str]]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(names)}


def _install(automation: Automation) -> None:
    try:
        automation.id = Automation.read(name=automation.name).id
    except ValueError:
        automation.create()
    else:
        automation.update()
