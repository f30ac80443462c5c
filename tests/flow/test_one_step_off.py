"""Runs whose rollouts are beside training: killed, interrupted and stopped by the alarm while both are at work."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from asking import mlflow
from command import run_json, start
from kills import PATIENT, RUN_ID, KilledRun
from machine import Machine

from moe_replay.archive.artifacts import RunStore
from moe_replay.stages.overview import RunOverview
from moe_replay.stages.samples import read_answers

pytestmark = pytest.mark.slow

ITERATIONS, STAGES = 4, 3
ASIDE = {**PATIENT, "iterations": ITERATIONS, "rollout.one_step_off": True, "evaluation.benchmarks": {}}
PARTIAL = {"rollout.partial_response_tokens": 3, "rollout.oversampled_prompts": 8}


def run_killed_midway(tmp_path: Path, home: Path, prefect_api: str, settings: dict[str, object], seed: int) -> RunStore:
    """The store of a run that nothing disturbed, which one that was killed several times made the same bytes as."""
    root = tmp_path / "undisturbed"
    run_json("run", f"--run-id={RUN_ID}", f"--root={root.as_uri()}", settings=settings)
    machine = Machine(tmp_path, home / "embedded", f"sqlite:///{home / 'mlflow.db'}", prefect_api)
    killed = KilledRun(machine, tmp_path / "runs", settings, ITERATIONS * STAGES, random.Random(seed))
    killed.kill("flow", after=2, then="resume")
    killed.kill("engine", after=2, then="none")
    killed.kill("everything", after=2, then="fresh checkout")
    killed.finish()
    assert [one.problem for one in killed.kills if one.problem] == []
    assert killed.problems(root / RUN_ID, mlflow(), ITERATIONS) == []
    return RunStore(root.as_uri(), RUN_ID)


def test_a_run_killed_while_it_samples_and_trains_goes_on_to_the_same_bytes(
    tmp_path: Path, home: Path, prefect_api: str
) -> None:
    store = run_killed_midway(tmp_path, home, prefect_api, ASIDE, seed=3)
    sampled_from = [store.committed("rollout", n).commit.inputs["policy"] for n in range(ITERATIONS)]
    trained = [store.commit_of("training", n) for n in range(ITERATIONS)]
    assert sampled_from[0] == sampled_from[1]
    assert sampled_from[2:] == trained[: ITERATIONS - 2]


def test_partial_rollouts_beside_training_tell_the_weights_of_each_token_and_survive_kills(
    tmp_path: Path, home: Path, prefect_api: str
) -> None:
    store = run_killed_midway(tmp_path, home, prefect_api, ASIDE | PARTIAL, seed=4)
    last = store.committed("rollout", ITERATIONS - 1)
    assert last is not None
    versions = {version for answer in read_answers(last) for version in answer.weight_versions or []}
    assert max(versions) == ITERATIONS - 2
    assert len(versions) > 1
    assert last.commit.metrics["rollout/staleness_max"] == ITERATIONS - 1 - min(versions) >= 2
    assert 0 < last.commit.metrics["rollout/carried_tokens"] < 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_both_at_once(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    settings = {**ASIDE, "rollout.prompts": 128, "rollout.responses": 32}
    process = start("run", "--run-id=stopped", f"--root={tmp_path}", settings=settings, group=True)
    iterations, deadline = tmp_path / "stopped/iterations", time.monotonic() + 300
    both = ("00000/_attempt-training-*/_attempt.json", "00001/_attempt-rollout-*/_attempt.json")
    while not all(list(iterations.glob(pattern)) for pattern in both):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert "resume stopped" in err
    assert psutil.wait_procs(family, timeout=10)[1] == [], "something outlived the command"
    assert not (iterations / "00001/rollout").exists(), "the rollout was waited for"


def test_where_the_alarm_stops_the_training_the_rollout_beside_it_is_kept(tmp_path: Path) -> None:
    # Nothing has moved before the first two batches are sampled, so the bound holds for iteration 0.
    settings = {**ASIDE, "method": "r3", "alarm.kl_k3": 1e-5}
    process = start("run", "--run-id=alarmed", f"--root={tmp_path}", "--json", settings=settings)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 3, err

    seen = RunOverview.of(RunStore(str(tmp_path), "alarmed"))
    assert (seen.following, seen.is_stopped) == ((1, "training"), True)
    kept = RunStore(str(tmp_path), "alarmed").commit_of("rollout", 2)
    assert kept is not None

    decided = ("resume", "alarmed", f"--root={tmp_path}", "--decide=skip", "--json")
    # The next batch is of the very policy that it trains, since nothing was learned; the one after is stale again.
    going_on = start(*decided)
    _, err = going_on.communicate(timeout=600)
    assert going_on.returncode == 3, err
    assert RunOverview.of(RunStore(str(tmp_path), "alarmed")).following == (3, "training")
    assert RunStore(str(tmp_path), "alarmed").commit_of("rollout", 2) == kept, err
    training = RunStore(str(tmp_path), "alarmed").committed("training", 1)
    assert training is not None
    assert training.commit.attributes["alarm_decisions"] == ["skip"]
