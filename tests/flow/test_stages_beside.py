"""Stages that work beside others, in worker threads of a real flow run: what is heard of them, and their time-outs."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import ask
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.sections import StagesConfig
from tasks.events import STAGE, tell_progress, telling_stage
from tasks.stages import configured

TRAINING, ROLLOUT = ("run", "training", 3), ("run", "rollout", 4)


@pytest.fixture(scope="module", autouse=True)
def on_the_server(prefect_api: str) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        yield


@task(name="beside", cache_policy=NO_CACHE)
def roll_out(fails: bool) -> None:
    with telling_stage(*ROLLOUT):
        for _ in range(3):
            tell_progress(*ROLLOUT)
        if fails:
            raise RuntimeError("no rollout")


@flow
def silent_training(rollout_fails: bool) -> str:
    """The training says nothing before the rollout beside it has ended."""
    with telling_stage(*TRAINING):
        roll_out.submit(rollout_fails).wait()
        tell_progress(*TRAINING)
    return str(flow_run.id)


@flow
def both_progress() -> str:
    with telling_stage(*TRAINING), telling_stage(*ROLLOUT):
        for _ in range(2):
            tell_progress(*TRAINING)
            tell_progress(*ROLLOUT)
    return str(flow_run.id)


@pytest.fixture(scope="module")
def runs(on_the_server: None) -> dict[str, str]:
    """Flow runs, all over before the server is asked, which keeps events for seconds before it tells them."""
    return {
        "silent training": silent_training(rollout_fails=False),
        "failed rollout": silent_training(rollout_fails=True),
        "both progress": both_progress(),
    }


def told(prefect_api: str, run: str) -> list[tuple[str, str, list[str]]]:
    """What happened, to which stage, and what was beside it, once the training has finished."""
    wanted = {"filter": {"event": {"prefix": [STAGE]}, "any_resource": {"id": [f"prefect.flow-run.{run}"]}}}
    deadline = time.monotonic() + 60
    while True:
        events = ask(f"{prefect_api}/events/filter", wanted)["events"]
        said = [_said(event) for event in sorted(events, key=lambda event: event["occurred"])]
        if ("finished", "training", []) in said:
            return said
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


def _said(event: dict[str, Any]) -> tuple[str, str, list[str]]:
    return event["event"].removeprefix(f"{STAGE}."), event["payload"]["stage"], event["payload"]["beside"]


def test_a_stage_that_progresses_or_finishes_leaves_one_that_is_silent_waited_for(
    prefect_api: str, runs: dict[str, str]
) -> None:
    assert told(prefect_api, runs["silent training"]) == [
        ("started", "training", []),
        ("started", "rollout", ["training of iteration 3"]),
        ("finished", "rollout", ["training of iteration 3"]),
        ("progressed", "training", []),
        ("progressed", "training", []),
        ("finished", "training", []),
    ]


def test_a_stage_that_failed_is_no_more_waited_for(prefect_api: str, runs: dict[str, str]) -> None:
    assert told(prefect_api, runs["failed rollout"]) == [
        ("started", "training", []),
        ("started", "rollout", ["training of iteration 3"]),
        ("progressed", "training", []),
        ("finished", "training", []),
    ]


def test_stages_beside_each_other_tell_of_progress_once_both_made_some(prefect_api: str, runs: dict[str, str]) -> None:
    assert told(prefect_api, runs["both progress"]) == [
        ("started", "training", []),
        ("started", "rollout", ["training of iteration 3"]),
        *[("progressed", "rollout", ["training of iteration 3"])] * 2,
        ("finished", "rollout", ["training of iteration 3"]),
        ("progressed", "training", []),
        ("finished", "training", []),
    ]


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((getattr(record, "task_name", ""), record.getMessage()))


@pytest.fixture
def logged() -> Iterator[list[tuple[str, str]]]:
    """Tasks and what was logged of their runs, so far."""
    records = Records()
    logging.getLogger("prefect.task_runs").addHandler(records)
    yield records.said
    logging.getLogger("prefect.task_runs").removeHandler(records)


@task(name="rollout", cache_policy=NO_CACHE)
def sleep_on(engine: EngineProcess) -> Any:
    return engine.call("process_calls:sleep", no_progress, 600)


@task(name="other", cache_policy=NO_CACHE)
def return_at_once(engine: EngineProcess) -> Any:
    return None


@flow
def submitting(engine: EngineProcess, seconds: float) -> str:
    """The state in which the work on the engine ends."""
    settings = StagesConfig(retries=0, timeout_seconds=seconds)
    slept, returned = (configured(one, settings).submit(engine) for one in (sleep_on, return_at_once))
    slept.wait()
    returned.wait()
    return slept.state.name or ""


def test_a_time_out_in_a_worker_thread_interrupts_work_on_an_engine_and_no_warning_denies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[tuple[str, str]]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engines")
    engine = EngineProcess("process_calls:Counter", (0,), "counter", tmp_path / "counter.log", {})
    try:
        engine.call("process_calls:add", no_progress, 1)
        began = time.monotonic()
        assert submitting(engine, 2.0) == "TimedOut"
        assert time.monotonic() - began < 60
        assert not engine.alive
    finally:
        engine.stop()
    assert {name for name, _ in logged} == {"rollout", "other"}
    assert {name for name, said in logged if "cannot interrupt" in said} == {"other"}
