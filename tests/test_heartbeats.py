"""Heartbeats of the flow runs inside a run, on a real Prefect server."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect_server import serving_prefect

from tasks.heartbeats import HEARTBEAT, sending_heartbeats, taking_over_heartbeats

# What the default tests see of them is in `flow/test_views.py`.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_prefect(Path(tmp_path_factory.mktemp("prefect"))) as url:
        yield url


@flow
@sending_heartbeats()
def inner() -> str:
    return str(flow_run.id)


@flow
def outer(times: int) -> tuple[str, list[str], float]:
    with taking_over_heartbeats():
        inner()  # the first looks up what later ones know
        start = time.monotonic()
        runs = [inner() for _ in range(times)]
        return str(flow_run.id), runs, time.monotonic() - start


def heartbeats(run: str) -> list[dict[str, Any]]:
    wanted = {"filter": {"event": {"name": [HEARTBEAT]}, "any_resource": {"id": [f"prefect.flow-run.{run}"]}}}
    with get_client(sync_client=True) as client:
        events = client.request("POST", "/events/filter", json=wanted).json()["events"]
    return [event for event in events if event["resource"]["prefect.resource.id"] == f"prefect.flow-run.{run}"]


def test_flow_runs_inside_a_run_send_heartbeats_and_end_at_once(prefect_api):
    with temporary_settings({PREFECT_API_URL: prefect_api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        whole, runs, seconds = outer(8)
        deadline = time.monotonic() + 30
        while not all(found := [heartbeats(run) for run in [whole, *runs]]) and time.monotonic() < deadline:
            time.sleep(0.5)
    assert [len(events) for events in found] == [1] * 9
    related = {one["prefect.resource.name"] for one in found[1][0]["related"] if one["prefect.resource.role"] == "flow"}
    assert related == {"inner"}
    # Prefect's own thread looks once a second: eight flow runs would wait eight seconds for it.
    assert seconds < 7


def test_no_heartbeat_is_sent_where_the_settings_want_none(prefect_api):
    with temporary_settings({PREFECT_API_URL: prefect_api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        whole, runs, _ = outer(1)
        time.sleep(2)
        assert [heartbeats(run) for run in [whole, *runs]] == [[], []]
