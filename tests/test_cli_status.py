"""`moe-replay status --watch`, beside a run that goes on."""

import json
import threading
import time
from itertools import pairwise

import pytest
from run_samples import CONFIG

from moe_replay.alarm import Excess
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.lease import holding
from moe_replay.cli import status as module
from moe_replay.cli.app import app
from moe_replay.cli.console import command_name
from moe_replay.errors import ConfigError
from moe_replay.stages.decisions import BatchAlarms

STAGES = ("rollout", "routes", "training", "evaluation")


@pytest.fixture
def store(tmp_path, monkeypatch) -> RunStore:
    monkeypatch.setattr(module, "_LOOK_AGAIN_SECONDS", 0.01)
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"config": {**CONFIG, "iterations": 2}})
    return store


def root_of(store: RunStore) -> str:
    return store.folder.name.rpartition("/")[0]


def look(store: RunStore, *words: str) -> None:
    app(["status", "run-1", "--root", root_of(store), *words], exit_on_error=False, result_action="return_value")


def watch(store: RunStore, *words: str) -> None:
    """Watch a run that is made meanwhile, each stage as soon as the one before can have been seen."""

    def work() -> None:
        with holding(store.folder, print):
            for iteration in (0, 1):
                for stage in STAGES:
                    time.sleep(0.1)
                    store.begin(stage, iteration, {}, "d").commit()

    worker = threading.Thread(target=work)
    worker.start()
    app(
        ["status", "run-1", f"--root={store.folder.name.rpartition('/')[0]}", "--watch", *words],
        result_action="return_value",
    )
    worker.join()


def test_a_log_gets_a_line_for_each_stage_and_what_changes_beside(store, capsys):
    watch(store)
    said = capsys.readouterr().out.splitlines()
    told = [line.partition(" committed")[0] for line in said if " committed" in line]
    assert told == [f"iteration {n}: {stage}" for n in (0, 1) for stage in STAGES]
    assert said[-1] == "complete: all of 2 iterations"
    assert sum(line.startswith("running: ") for line in said) == 1


def test_a_program_gets_an_object_for_each_change(store, capsys):
    watch(store, "--json")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    numbers = [sum(stage["state"] == "committed" for stage in one["stages"]) for one in said]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 8
    assert (said[-1]["next"], said[-1]["running"]) == (None, None)
    assert all(one != two for one, two in pairwise(said))


def test_a_run_that_nobody_works_on_says_how_to_go_on(store, capsys):
    store.begin("rollout", 0, {}, "d").commit()
    look(store)
    said = capsys.readouterr().out
    assert "next: routes of iteration 0, of 2 iterations; " in said
    assert f"resume run-1 --root {root_of(store)}\n" in said


def test_a_run_that_is_paused_is_not_said_to_be_at_work(store, capsys):
    raise_alarm(store)
    with holding(store.folder, print):
        look(store)
    said = capsys.readouterr().out
    assert "training of iteration 0 waits for a decision: mismatch/kl_k3 = 1 is beyond the bound of 0.5" in said
    assert "at work" not in said


def test_who_can_decide_is_told_where_a_runner_may_show_a_form_or_be_about_to_end(store, capsys):
    raise_alarm(store)
    with holding(store.folder, print):
        look(store)
    said = capsys.readouterr().out
    assert "; if the runner is a flow run that is paused for it, answer in Prefect (Resume), or cancel that; " in said
    assert f"once no runner is there: {command_name()} resume run-1 --root {root_of(store)} --decide train|skip" in said


def test_watching_ends_at_a_decision_that_nobody_but_the_user_takes(store, capsys):
    raise_alarm(store)
    look(store, "--watch")
    assert "resume run-1 --root " in capsys.readouterr().out


def test_a_run_that_is_being_prepared_is_told_from_one_that_is_not_there(tmp_path, capsys):
    store = RunStore(str(tmp_path), "run-1")
    with holding(store.folder, print), pytest.raises(ConfigError, match=r"is not there yet: .* prepares it"):
        look(store)
    with pytest.raises(ConfigError, match="there is no run run-1"):
        look(store, "--watch")


def raise_alarm(store: RunStore) -> None:
    rollout = store.begin("rollout", 0, {}, "d").commit()
    store.begin("routes", 0, {"rollout": rollout}, "d").commit()
    BatchAlarms(store, 0, rollout).raise_alarm(Excess("mismatch/kl_k3", 1.0, 0.5))
