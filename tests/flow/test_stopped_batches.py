"""The stability alarm as people meet it: on the command line, and paused in the Prefect UI."""

import contextvars
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
import settled_batches
from asking import until
from command import SMALL, run_json, start
from fault_proxy import Fault, Refusal, Request, always, in_front_of
from mlflow import MlflowClient
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Scheduled
from settled_batches import EXCESS, ITERATION, deployed, execute, settled_alone, stopped

from flows.train import train
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.lease import holding
from moe_replay.config_reading import load_config
from moe_replay.errors import StabilityAlarm
from moe_replay.stages.decisions import is_skipped
from moe_replay.stages.run import Run
from moe_replay.tiny import EmbeddedAssets
from tasks.stability import EVENT

ALARMED = {**SMALL, "method": "grpo", "alarm.kl_k3": 0}
"""A bound that every batch passes."""


@pytest.fixture(autouse=True)
def in_process(prefect_api: str) -> Iterator[None]:
    """Flows of this process use the server too."""
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        yield


def start_deployed(flow_run: FlowRun, root: Path) -> Future[Any]:
    """Run the flow as a worker does, in a thread."""
    work = contextvars.copy_context()
    return ThreadPoolExecutor(1).submit(work.run, execute, flow_run.id, root)


@contextmanager
def deployed_process(flow_run: FlowRun, root: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the flow in a process of its own, which is killed at the end of the block."""
    command = [sys.executable, settled_batches.__file__, str(flow_run.id), str(root)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **paths, **environment})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_pause(parent: FlowRun, is_over: Callable[[], bool], earlier: UUID | None = None) -> UUID:
    """Wait until the flow run below `parent` waits for an answer, not in an `earlier` state; returns its id."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not is_over():
        for found in runs_below(parent):
            if found.state and found.state.is_paused() and found.state_id != earlier and asks(found.id):
                return found.id
        time.sleep(0.2)
    raise AssertionError("the flow run did not pause")


def asks(flow_run: UUID) -> bool:
    """Whether the form is there; it follows the pause."""
    with get_client(sync_client=True) as client:
        keyset = client.read_flow_run(flow_run).state.state_details.run_input_keyset
        inputs = client._client.post(f"/flow_runs/{flow_run}/input/filter", json={"prefix": keyset["description"]})
    return bool(inputs.json())


def runs_below(parent: FlowRun) -> list[FlowRun]:
    below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent.id]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=below)


@pytest.mark.slow
def test_a_deployed_run_pauses_with_the_reason_and_goes_on_as_was_decided_in_the_ui(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path)
    flow_run = deployed(run.run_id)
    done = start_deployed(flow_run, tmp_path)
    paused = wait_for_pause(flow_run, done.done)
    with get_client(sync_client=True) as client:
        keyset = client.read_flow_run(paused).state.state_details.run_input_keyset
        shown = client.read_flow_run_input(paused, keyset["description"])
    assert "mismatch/kl_k3 = 0.25 is beyond the bound of 0.125" in shown
    assert "`fall_back`: train on it under the routes of the rollout" in shown
    with pytest.raises(RuntimeError, match="'stop' is not one of"):
        resume_flow_run(paused, run_input={"decision": "stop"})

    resume_flow_run(paused, run_input={"decision": "skip"})

    done.result(timeout=60)
    [decision] = batch.decisions()
    assert (decision.action, decision.decided_by) == ("skip", "person")


@pytest.mark.slow
def test_a_paused_run_that_nobody_decides_on_fails_with_the_alarm(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path, wait_seconds=1)
    flow_run = deployed(run.run_id)
    with pytest.raises(StabilityAlarm, match="the message"):
        start_deployed(flow_run, tmp_path).result(timeout=200)
    assert batch.waiting() is not None
    [below] = runs_below(flow_run)
    with get_client(sync_client=True) as client:
        assert "Paused" in [state.name for state in client.read_flow_run_states(below.id)]


@pytest.mark.slow
def test_a_run_killed_in_its_pause_pauses_again_when_it_is_retried(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path)
    flow_run = deployed(run.run_id)
    with deployed_process(flow_run, tmp_path) as process:
        paused = wait_for_pause(flow_run, lambda: process.poll() is not None)
    with get_client(sync_client=True) as client:
        first = client.read_flow_run(paused).state_id
        # As the automation of dead flow runs does it, and then Retry.
        for state in (Crashed(), Scheduled()):
            client.set_flow_run_state(flow_run.id, state, force=True)

    done = start_deployed(flow_run, tmp_path)
    again = wait_for_pause(flow_run, done.done, first)
    resume_flow_run(again, run_input={"decision": "skip"})

    done.result(timeout=60)
    assert [decision.action for decision in batch.decisions()] == ["skip"]


@pytest.mark.slow
def test_a_pause_outlasts_its_server(tmp_path: Path, prefect_api: str) -> None:
    run, batch = stopped(tmp_path)
    flow_run = deployed(run.run_id)
    url = urlsplit(prefect_api)
    with in_front_of(int(url.port or 0)) as proxy:
        proxy.plan = no_events
        # Prefect by itself gives up after a minute of attempts.
        settings = {"PREFECT_API_URL": f"{proxy.url}{url.path}", "PREFECT_CLIENT_MAX_RETRIES": "0"}
        with deployed_process(flow_run, tmp_path, **settings) as process:
            paused = wait_for_pause(flow_run, lambda: process.poll() is not None)
            proxy.forget()
            proxy.plan = always(Fault.RESET_BEFORE)
            asked = lambda: len(proxy.of("GET", str(paused))) >= 2  # noqa: E731
            until(lambda: asked() or process.poll() is not None, "the answer was not asked for twice")
            proxy.plan = no_events
            resume_flow_run(paused, run_input={"decision": "lower_lr"})

            until(lambda: batch.decisions() or process.poll() is not None, "nothing was decided")
    assert [decision.action for decision in batch.decisions()] == ["lower_lr"], (tmp_path / "log").read_text()


def test_what_was_decided_elsewhere_stands(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path)
    flow_run = deployed(run.run_id)
    done = start_deployed(flow_run, tmp_path)
    paused = wait_for_pause(flow_run, done.done)
    batch.decide(run.config, "train", "person")
    resume_flow_run(paused, run_input={"decision": "skip"})
    done.result(timeout=60)
    # Also where training raised its alarm just before.
    settled_alone(run, batch)
    assert [decision.action for decision in batch.decisions()] == ["train"]
    assert "**train, as was decided**" in artifact(f"alarm-{run.run_id}-{ITERATION}")


def test_a_rule_decides_at_once_and_is_shown_in_the_ui_and_emitted_as_an_event(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path, rule="lower_lr", lr_factor=0.5)
    settled_alone(run, batch)
    [decision] = batch.decisions()
    assert (decision.action, decision.lr_factor, decision.decided_by) == ("lower_lr", 0.5, "rule")
    assert "**lower_lr, by rule**" in artifact(f"alarm-{run.run_id}-2")
    payload = event_of(run.run_id)
    assert payload == {"run": run.run_id, "iteration": 2, **EXCESS._asdict()}


@pytest.mark.slow
def test_without_a_deployment_the_run_stops_and_after_falling_back_the_rule_decides_no_more(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path, rule="fall_back")
    settled_alone(run, batch)
    batch.raise_alarm(EXCESS)
    with pytest.raises(StabilityAlarm, match="the message"):
        settled_alone(run, batch)
    assert [decision.action for decision in batch.decisions()] == ["fall_back"]


def test_the_command_stops_before_it_trains_and_resumes_with_a_decision(tmp_path: Path, home: Path) -> None:
    root = f"--root={tmp_path}"
    process = start("run", "--run-id=alarmed", "--iterations=1", root, "--json", settings=ALARMED)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (3, "")
    assert f"moe-replay resume alarmed --root {tmp_path} --decide train|skip|lower_lr|fall_back" in err
    assert "Traceback" not in err
    store = RunStore(str(tmp_path), "alarmed")
    assert store.commit_of("training", 0) is None

    said = run_json("resume", "alarmed", "--decide=lower_lr", "--set=alarm.lr_factor=0.5", root)

    assert said["iterations"][0]["alarm/raised"] == 1
    tags = MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_run(said["mlflow_run_id"]).data.tags
    assert tags["alarm.decisions"] == "0: lower_lr"
    training = store.committed("training", 0)
    assert training is not None
    assert training.commit.attributes["alarm_lr_factor"] == 0.5


@pytest.mark.parametrize(
    ("words", "decided", "told"),
    [
        ([], True, "waits for no decision"),
        (["--set=iterations=9"], False, "exists with another config"),
        (["--from-stage=training", "--iteration=2"], False, "takes back what was decided"),
    ],
)
def test_a_decision_that_could_not_be_acted_on_is_refused_and_not_written_down(
    tmp_path: Path, assets: EmbeddedAssets, words: list[str], decided: bool, told: str
) -> None:
    run, batch = stopped(tmp_path)
    if decided:
        batch.decide(run.config, "skip", "person")
    code, err = resumed(run, "--decide=train", *words)
    assert code == 2
    assert told in err
    assert [one.action for one in batch.decisions()] == ["skip"] * decided


def test_a_decision_is_refused_while_a_runner_waits_for_it_elsewhere(tmp_path: Path) -> None:
    run, batch = stopped(tmp_path)
    with holding(run.store().folder, print):
        code, err = resumed(run, "--decide=train")
    assert code == 1
    assert "is in use" in err
    assert batch.decisions() == ()


def resumed(run: Run, *words: str) -> tuple[int, str]:
    """Exit code and standard error of `moe-replay resume`."""
    process = start("resume", run.run_id, f"--root={run.root}", *words)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.slow
def test_a_predicting_run_goes_on_without_a_predictor_after_a_batch_that_was_skipped(tmp_path: Path) -> None:
    settings = {**ALARMED, "method": "pr2", "predictor.judged_on": "held_out"}
    command = ("run", "--run-id=skipping", "--iterations=3", f"--root={tmp_path}")
    for words in (command, *(("resume", "skipping", f"--decide={it}", command[-1]) for it in ("train", "skip"))):
        process = start(*words, settings=settings if words is command else {})
        _, err = process.communicate(timeout=600)
        assert process.returncode == 3, err
    run_json("resume", "skipping", "--decide=train", command[-1])

    store = RunStore(str(tmp_path), "skipping")
    trainings = [store.committed("training", n) for n in range(3)]
    assert [is_skipped(training) for training in trainings if training] == [False, True, False]
    fitted = [store.committed("predictor", n) for n in range(3)]
    assert [predictor is not None for predictor in fitted] == [True, False, True]
    assert fitted[2] is not None
    assert "previous" not in fitted[2].commit.inputs
    rollouts = [store.committed("rollout", n) for n in range(3)]
    assert ["predictor" in rollout.commit.inputs for rollout in rollouts if rollout] == [False, True, False]


@pytest.mark.slow
def test_a_deployed_training_pauses_and_is_trained_as_was_decided(tmp_path: Path, home: Path) -> None:
    config = load_config(None, {**ALARMED, "iterations": 1, "storage.root": str(tmp_path)})
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(train), "alarmed", entrypoint="flows.train.train")
        parameters = {"config": config.model_dump(mode="json"), "run_id": "deployed"}
        flow_run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
    with (home / "deployed.log").open("w") as log:
        command = [sys.executable, "-m", "prefect", "flow-run", "execute", str(flow_run.id)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        paused = wait_for_pause(flow_run, lambda: process.poll() is not None)
        resume_flow_run(paused, run_input={"decision": "skip"})
        assert process.wait(300) == 0, (home / "deployed.log").read_text()
    training = RunStore(str(tmp_path), "deployed").committed("training", 0)
    assert training is not None
    assert is_skipped(training)


def no_events(request: Request) -> Refusal | None:
    """A plan that refuses what is no exchange of one request and one answer."""
    return Refusal(503, "no web sockets") if "upgrade" in request.headers else None


def artifact(key: str) -> str:
    found = Artifact.get(key)
    assert found is not None
    return str(found.data)


def event_of(run_id: str) -> dict[str, Any]:
    """The payload of a run's alarm; events reach the server with some delay."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            body = {"filter": {"event": {"name": [EVENT]}, "resource": {"id": [f"moe-replay.run.{run_id}"]}}}
            events = client._client.post("/events/filter", json=body).json()["events"]
        if events:
            return events[-1]["payload"]
        time.sleep(0.5)
    raise AssertionError(f"the server has no event of run {run_id}")
