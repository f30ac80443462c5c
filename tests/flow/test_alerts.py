"""Alerts: automations of a real Prefect server that call a real HTTP receiver on loopback."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import run_json, start

TOKEN = "secret-path-of-the-webhook"
FAIL = "import sys; from flows.train import train; from moe_replay.config import load_config; "
FAIL += "train(load_config(None, {'model.path': sys.argv[1], 'storage.root': sys.argv[1]}), 'dense')"
Received = Callable[[str], dict[str, Any]]


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
    for _ in range(2):
        said = run_json("alerts", "install", "--stalled-after=2m", MOE_REPLAY_ALERT_WEBHOOK=posts[0])
    # The server's consumer of events learns of automations by a message.
    time.sleep(1)
    return said["automations"]


@pytest.fixture
def received(posts: tuple[str, list[dict[str, Any]]]) -> Received:
    """Waits until an alert of this kind was posted."""

    def wait(alert: str) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while not (found := [body for body in posts[1] if body["alert"] == alert]):
            assert time.monotonic() < deadline, f"no alert {alert!r} in {posts[1]}"
            time.sleep(0.2)
        return found[-1]

    return wait


def ask(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"null")


def emit(api: str, event: str, resource: str, seconds_ago: float, **payload: Any) -> None:
    """Send an event as a flow run would have done it some time ago."""
    occurred = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
    about = {"prefect.resource.id": resource, "prefect.resource.name": "a-run"}
    ask(
        f"{api}/events",
        [{"event": event, "id": str(uuid.uuid4()), "occurred": occurred, "resource": about, "payload": payload}],
    )


def test_installing_again_updates_the_same_automations(installed: list[str], prefect_api: str) -> None:
    ours = [one["name"] for one in ask(f"{prefect_api}/automations/filter", {}) if one["name"].startswith("moe-replay")]
    assert sorted(ours) == sorted(installed)
    assert len(ours) == 4


def test_the_webhooks_url_is_kept_as_a_secret_and_told_nowhere(
    installed: list[str], posts: tuple[str, list], prefect_api: str, home: Path
) -> None:
    assert TOKEN not in json.dumps(ask(f"{prefect_api}/automations/filter", {}))
    assert TOKEN not in json.dumps(ask(f"{prefect_api}/block_documents/filter", {}))
    process = start("alerts", "install", MOE_REPLAY_ALERT_WEBHOOK=f"ftp://host/{TOKEN}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert TOKEN not in out + err


def test_a_failed_training_is_posted_with_its_reason_and_logged_with_the_way_on(
    installed: list[str], received: Received, tmp_path: Path, prefect_api: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = subprocess.run(
        [sys.executable, "-c", FAIL, str(tmp_path)], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    ended = time.monotonic()
    assert done.returncode != 0

    alert = received("failed")

    assert time.monotonic() - ended < 15
    assert (alert["flow"], alert["flow_run"]) == ("train", "train-dense")
    assert alert["resume"] == f"moe-replay resume dense --root {tmp_path}"
    assert "is dense" in alert["reason"]
    assert "is dense" in alert["text"]
    told = [line for line in done.stderr.splitlines() if f"to go on: {alert['resume']}" in line]
    assert told
    assert "is dense" in told[0]


def test_a_stage_that_falls_silent_is_posted_and_one_that_finished_is_not(
    installed: list[str], received: Received, posts: tuple[str, list[dict[str, Any]]], prefect_api: str
) -> None:
    silent, finished = (f"prefect.flow-run.{uuid.uuid4()}" for _ in range(2))
    for run, resource in (("silent", silent), ("finished", finished)):
        emit(prefect_api, "moe-replay.stage.started", resource, 115, run=run, stage="training", iteration=3)
    emit(prefect_api, "moe-replay.stage.finished", finished, 114, run="finished", stage="training", iteration=3)

    assert received("stalled")["run"] == "silent"
    assert "training of iteration 3" in received("stalled")["text"]
    assert [body["run"] for body in posts[1] if body["alert"] == "stalled"] == ["silent"]


def test_a_stability_alarm_is_posted_with_metric_and_bound(
    installed: list[str], received: Received, prefect_api: str
) -> None:
    told = {"run": "shaky", "iteration": 7, "metric": "mismatch/kl_k3", "value": 0.5, "bound": 0.1}
    emit(prefect_api, "moe-replay.stability-alarm", "moe-replay.run.shaky", 0, **told)
    alert = received("stability")
    assert (alert["run"], alert["iteration"], alert["reason"]) == (
        "shaky",
        7,
        "mismatch/kl_k3 is 0.5, the bound is 0.1",
    )


def test_a_flow_run_without_a_sign_of_life_becomes_crashed(installed: list[str], prefect_api: str) -> None:
    flow = ask(f"{prefect_api}/flows/", {"name": "train"})
    run = ask(f"{prefect_api}/flow_runs/", {"flow_id": flow["id"], "state": {"type": "RUNNING"}})
    emit(prefect_api, "prefect.flow-run.heartbeat", f"prefect.flow-run.{run['id']}", 85)

    deadline = time.monotonic() + 40
    while True:
        with urllib.request.urlopen(f"{prefect_api}/flow_runs/{run['id']}") as response:
            state = json.load(response)["state"]
        if state["type"] == "CRASHED":
            break
        assert time.monotonic() < deadline, state
        time.sleep(0.3)
    assert "no sign of life" in state["message"]
