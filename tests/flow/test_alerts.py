"""Alerts: automations of a real Prefect server that call a real HTTP receiver on loopback."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from asking import ask
from command import run_json, start
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_server import serving_prefect

from tasks.alerts import install_alerts
from tasks.failures import way_on

TOKEN = "secret-path-of-the-webhook"
FAIL = "import sys; from flows.train import train; from moe_replay.config_reading import load_config; "
FAIL += "train(load_config(None, {'model.path': sys.argv[1], 'storage.root': sys.argv[1]}), 'dense')"
RETRY = "retry it in the Prefect UI"
LONGEST = 240
"""Seconds that an alert may take: where events come late, the server looks two minutes after for what is overdue."""
Received = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def prefect_api(home: Path) -> Iterator[str]:
    """A server of its own: automations watch, and slow down, all that runs on theirs."""
    with serving_prefect(home / "watched") as url:
        yield url


@pytest.fixture(scope="module")
def posts() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """URL of a webhook, and what was posted to it."""
    bodies: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{TOKEN}", bodies
    server.shutdown()


@pytest.fixture(scope="module")
def installed(posts: tuple[str, list], prefect_api: str, prefect_for_commands: None) -> list[str]:
    """Names of the automations, installed twice."""
    said = run_json("alerts", "install", "--stalled-after=2m", MOE_REPLAY_ALERT_WEBHOOK=posts[0])
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        assert install_alerts(None, timedelta(minutes=2)) == said["automations"]
    return said["automations"]


@pytest.fixture(scope="module", autouse=True)
def past(installed: list[str], prefect_api: str) -> dict[str, str]:
    """Flow runs, by flow, that sent a sign of life a minute ago; and four whose stages told of themselves.

    They have half a minute left. They are told of right after the installation: then the server looks for what is
    overdue within seconds, and at what it knows by then again as soon as it is due; otherwise in two minutes.
    """
    runs = {flow: running(prefect_api, flow) for flow in ("another", "train")}
    beats = [event("prefect.flow-run.heartbeat", run, 60, flow) for flow, run in runs.items()]
    silent, finished, left = ({"run": r, "stage": "training", "iteration": 3} for r in ("silent", "finished", "left"))
    ahead = {"stage": "rollout", "iteration": 4, "beside": ["training of iteration 3"]}
    stages = [
        event("moe-replay.stage.started", "1", 90, **silent),
        event("moe-replay.stage.started", "2", 90, **finished),
        event("moe-replay.stage.finished", "2", 89, **finished),
        event("moe-replay.stage.started", "4", 90, **left),
        event("moe-replay.stage.finished", "4", 89, run="left", **ahead),
        event("moe-replay.stage.progressed", "4", 89, **left),
        event("moe-replay.stage.started", "5", 90, run="both silent", **ahead),
    ]
    # The server takes events of one request in no certain order, but where one says what it follows.
    last: dict[str, str] = {}
    for told in stages:
        told["follows"] = last.get(told["resource"]["prefect.resource.id"])
        last[told["resource"]["prefect.resource.id"]] = told["id"]
    ask(f"{prefect_api}/events", [*beats, *stages])
    return runs


@pytest.fixture
def received(posts: tuple[str, list[dict[str, Any]]]) -> Received:
    """Waits until an alert was posted of which this is true."""

    def wait(**said: str) -> dict[str, Any]:
        deadline = time.monotonic() + LONGEST
        while not (found := [body for body in posts[1] if said.items() <= body.items()]):
            assert time.monotonic() < deadline, f"no alert {said} in {posts[1]}"
            time.sleep(0.2)
        return found[-1]

    return wait


def running(api: str, flow: str, parameters: dict[str, Any] | None = None) -> str:
    """The id of a flow run of which the server thinks that it runs."""
    flow_id = ask(f"{api}/flows/", {"name": flow})["id"]
    made = {"flow_id": flow_id, "parameters": parameters or {}, "state": {"type": "RUNNING"}}
    return ask(f"{api}/flow_runs/", made)["id"]


def event(name: str, flow_run: str, seconds_ago: float, flow: str = "train", **payload: Any) -> dict[str, Any]:
    """An event as a flow run would have sent it some time ago."""
    of = {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": flow}
    return {
        "event": name,
        "id": str(uuid.uuid4()),
        "occurred": (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.name": "a-run"},
        "related": [of],
        "payload": payload,
    }


def test_installing_again_updates_the_same_automations(installed: list[str], prefect_api: str) -> None:
    ours = [one["name"] for one in ask(f"{prefect_api}/automations/filter", {}) if one["name"].startswith("moe-replay")]
    assert sorted(ours) == sorted(installed)
    assert len(ours) == 4


def test_the_webhooks_url_is_kept_as_a_secret_and_told_nowhere(prefect_api: str) -> None:
    assert TOKEN not in json.dumps(ask(f"{prefect_api}/automations/filter", {}))
    assert TOKEN not in json.dumps(ask(f"{prefect_api}/block_documents/filter", {}))
    process = start("alerts", "install", MOE_REPLAY_ALERT_WEBHOOK=f"ftp://host/{TOKEN}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert TOKEN not in out + err


def test_a_failed_training_is_posted_with_its_reason_and_logged_with_the_way_on(
    received: Received, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = subprocess.run(
        [sys.executable, "-c", FAIL, str(tmp_path)], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode != 0

    alert = received(alert="failed", flow_run="train-dense")

    assert alert["flow"] == "train"
    assert alert["resume"] == f"moe-replay resume dense --root {tmp_path}"
    assert "is dense" in alert["reason"]
    assert "is dense" in alert["text"]
    told = [line for line in done.stderr.splitlines() if f"to go on: {alert['resume']}" in line]
    assert told
    assert "is dense" in told[0]


@pytest.mark.parametrize(
    ("name", "parameters", "run"),
    [
        ("amber-fox", {"run_id": "nightly", "config": {"storage": {"root": "/data"}}}, "nightly --root /data"),
        ("blue-hen", {"run_id": "nightly"}, "nightly"),
        ("train-{own}", {"run_id": None, "config": {}}, "{own}"),
        ("grey-owl", {}, None),
    ],
)
def test_the_way_on_names_the_run_whatever_its_flow_run_is_called(
    received: Received, prefect_api: str, name: str, parameters: dict[str, Any], run: str | None
) -> None:
    flow_run = running(prefect_api, "train", parameters)
    own = f"run-{flow_run[:8]}"
    ask(f"{prefect_api}/flow_runs/{flow_run}", {"name": name.format(own=own)}, "PATCH")
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:
        logged = way_on("train", client.read_flow_run(uuid.UUID(flow_run)))
    ask(f"{prefect_api}/flow_runs/{flow_run}/set_state", {"state": {"type": "FAILED", "message": "no such image"}})

    posted = received(alert="failed", flow_run_id=f"prefect.flow-run.{flow_run}")["resume"]

    command = f"moe-replay resume {run.format(own=own)}" if run else None
    assert posted == (command or RETRY)
    assert logged == (f"{command}, or {RETRY}" if command else RETRY)


def test_a_stability_alarm_is_posted_with_metric_and_bound(received: Received, prefect_api: str) -> None:
    told = {"run": "shaky", "iteration": 7, "metric": "mismatch/kl_k3", "value": 0.5, "bound": 0.1}
    ask(f"{prefect_api}/events", [event("moe-replay.stability-alarm", "3", 0, **told)])
    alert = received(alert="stability")
    assert (alert["run"], alert["iteration"], alert["reason"]) == (
        "shaky",
        7,
        "mismatch/kl_k3 is 0.5, the bound is 0.1",
    )


@pytest.mark.slow
def test_a_stage_that_falls_silent_is_posted_and_one_that_finished_is_not(
    received: Received, posts: tuple[str, list[dict[str, Any]]]
) -> None:
    assert "training of iteration 3" in received(alert="stalled", run="silent")["text"]
    assert received(alert="stalled", run="left")["stage"] == "training of iteration 3"
    assert received(alert="stalled", run="both silent")["stage"] == "rollout of iteration 4 or training of iteration 3"
    assert "finished" not in {body["run"] for body in posts[1] if body["alert"] == "stalled"}


@pytest.mark.slow
def test_a_flow_run_without_a_sign_of_life_becomes_crashed_unless_it_is_anothers(
    past: dict[str, str], prefect_api: str
) -> None:
    deadline = time.monotonic() + LONGEST
    while (state := ask(f"{prefect_api}/flow_runs/{past['train']}", method="GET")["state"])["type"] != "CRASHED":
        assert time.monotonic() < deadline, state
        time.sleep(0.3)
    assert "no sign of life" in state["message"]
    assert ask(f"{prefect_api}/flow_runs/{past['another']}", method="GET")["state"]["type"] == "RUNNING"
