"""What storage alone tells of a run at one moment."""

import pytest
from run_samples import CONFIG

from moe_replay.alarm import Excess
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import EVALUATES_KEY
from moe_replay.archive.lease import holding
from moe_replay.archive.superseding import made_from, supersede
from moe_replay.errors import ConfigError
from moe_replay.stages.decisions import BatchAlarms
from moe_replay.stages.overview import RunOverview

STAGES = ("rollout", "routes", "training", "evaluation")


@pytest.fixture
def store(tmp_path) -> RunStore:
    """A run of two iterations with nothing committed."""
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"config": {**CONFIG, "iterations": 2}})
    return store


def commit(store: RunStore, iteration: int, *stages: str) -> None:
    for stage in stages:
        inputs = {}
        if stage != "rollout" and (rollout := store.commit_of("rollout", iteration)):
            inputs["rollout"] = rollout
        store.begin(stage, iteration, inputs, "d").commit()


def test_the_next_stage_is_the_first_that_is_not_committed(store):
    assert RunOverview.of(store).following == (0, "rollout")
    for iteration in (0, 1):
        for stage in STAGES:
            assert RunOverview.of(store).following == (iteration, stage)
            commit(store, iteration, stage)
    seen = RunOverview.of(store)
    assert (seen.following, seen.is_over, len(seen.stages)) == (None, True, 8)


def test_a_rollout_one_step_off_leaves_the_iteration_before_it_at_work(store):
    commit(store, 0, "rollout", "routes")
    commit(store, 1, "rollout")
    seen = RunOverview.of(store)
    assert (seen.following, seen.settled()) == ((0, "training"), {})
    commit(store, 0, "training", "evaluation")
    assert RunOverview.of(store).following == (1, "routes")


def test_what_is_sampled_beside_a_training_is_told(tmp_path):
    store = RunStore(str(tmp_path), "one-step-off")
    store.create_run({"config": {**CONFIG, "iterations": 2, "rollout": {**CONFIG["rollout"], "one_step_off": True}}})
    assert RunOverview.of(store).beside is None
    commit(store, 0, "rollout")
    assert RunOverview.of(store).beside == (1, "rollout")
    commit(store, 1, "rollout")
    assert RunOverview.of(store).beside is None
    commit(store, 0, *STAGES[1:])
    assert (RunOverview.of(store).following, RunOverview.of(store).beside) == ((1, "routes"), None)


def test_what_was_taken_back_is_next_however_much_is_there_after_it(store):
    commit(store, 0, *STAGES)
    commit(store, 1, *STAGES)
    supersede(store, made_from(store, "evaluation", 0))
    seen = RunOverview.of(store)
    assert (seen.following, seen.settled(), seen.is_over) == ((0, "evaluation"), {}, False)


def test_an_alarm_on_a_batch_waits_until_it_is_that_batchs_turn(store):
    commit(store, 0, "rollout", "routes")
    commit(store, 1, "rollout", "routes")
    rollout = store.commit_of("rollout", 1)
    assert rollout is not None
    BatchAlarms(store, 1, rollout).raise_alarm(Excess("mismatch/kl_k3", 0.25, 0.125))
    assert RunOverview.of(store).alarm is None
    commit(store, 0, "training", "evaluation")
    seen = RunOverview.of(store)
    assert (seen.following, seen.is_stopped) == ((1, "training"), True)


def test_stages_that_the_run_has_not_are_not_shown(store):
    commit(store, 0, "rollout")
    assert [(one.stage, one.state) for one in RunOverview.of(store).stages] == [
        ("rollout", "committed"),
        ("routes", "missing"),
        ("training", "missing"),
        ("evaluation", "missing"),
    ]


def test_a_run_that_somebody_works_on_is_not_over(store):
    commit(store, 0, *STAGES)
    commit(store, 1, *STAGES)
    with holding(store.folder, print):
        seen = RunOverview.of(store)
        assert (seen.following, seen.is_over) == (None, False)
    assert RunOverview.of(store).is_over


def test_looking_again_reads_what_changed_and_sees_what_was_superseded(store):
    commit(store, 0, *STAGES)
    commit(store, 1, "rollout")
    before = RunOverview.of(store)
    assert set(before.settled()) == {0}
    commit(store, 1, "routes")
    assert RunOverview.of(store, before) == RunOverview.of(store)
    supersede(store, made_from(store, "evaluation", 0))
    assert RunOverview.of(store, before) == RunOverview.of(store)
    assert [one.state for one in RunOverview.of(store, before).stages][:4] == ["committed"] * 3 + ["missing"]


def test_an_evaluation_has_its_scores_alone_and_no_end(tmp_path):
    store = RunStore(str(tmp_path), "scores")
    store.create_run({EVALUATES_KEY: {"subject": "run-1"}})
    commit(store, 3, "evaluation")
    seen = RunOverview.of(store)
    assert [(one.iteration, one.stage) for one in seen.stages] == [(3, "evaluation")]
    assert (seen.plan, seen.following, seen.is_over) == (None, None, False)


def test_a_run_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(ConfigError, match="there is no run"):
        RunOverview.of(RunStore(str(tmp_path), "nothing"))
