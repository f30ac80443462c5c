"""Alarms and decisions in storage."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from predictor_samples import make_run

from moe_replay.alarm import Action, Excess
from moe_replay.archive.commits import ArtifactRef
from moe_replay.config_reading import parse_config
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.stages.decisions import BatchAlarms, Decided, is_skipped, waiting_batch

EXCESS = Excess("mismatch/kl_k3", 0.25, 0.125)
GRPO, R3 = (parse_config({"method": method, "alarm": {"lr_factor": 0.5}}) for method in ("grpo", "r3"))


@pytest.fixture
def batch(tmp_path) -> BatchAlarms:
    """A batch of iteration 3 that stopped at the alarm."""
    store = make_run(tmp_path).store()
    batch = BatchAlarms(store, 3, store.begin("rollout", 3, {}, "d").commit())
    batch.raise_alarm(EXCESS)
    return batch


def test_an_alarm_waits_with_its_reason_until_it_is_decided_on(batch):
    alarm = batch.waiting()
    assert alarm.reason == "mismatch/kl_k3 = 0.25 is beyond the bound of 0.125"
    decision = batch.decide(GRPO, "lower_lr", "person")
    assert batch.waiting() is None
    assert batch.decisions() == (decision,)
    assert (decision.alarm, decision.action, decision.lr_factor, decision.decided_by) == (
        alarm,
        "lower_lr",
        0.5,
        "person",
    )


def test_what_was_decided_stands(batch):
    batch.decide(GRPO, "skip", "rule")
    with pytest.raises(ConfigError, match="waits for no decision"):
        batch.decide(GRPO, "train", "person")
    batch.raise_alarm(EXCESS)
    assert [decision.action for decision in batch.decisions()] == ["skip"]


def test_of_many_who_decide_at_once_one_decision_stands_and_the_others_hear_of_it(batch):
    def decide(action: Action) -> Action | None:
        try:
            return batch.decide(GRPO, action, "person").action
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(decide, ("train", "skip", "lower_lr", "train", "skip", "lower_lr")))
    [standing] = batch.decisions()
    assert {outcome for outcome in outcomes if outcome} == {standing.action}


def test_after_falling_back_there_is_a_second_decision_and_no_third(batch):
    batch.decide(GRPO, "fall_back", "rule")
    assert batch.waiting() is None
    second = batch.raise_alarm(EXCESS)
    assert second.fallen_back
    assert "under the rollout's routes" in second.reason
    with pytest.raises(ConfigError, match="nothing to fall_back to; decide for one of train, skip, lower_lr"):
        batch.decide(GRPO, "fall_back", "person")
    batch.decide(GRPO, "lower_lr", "person")
    decided = Decided.of(GRPO, batch.decisions())
    assert decided.config.method.route_source == "rollout"
    assert (decided.is_final, decided.skips, decided.lr_factor) == (True, False, 0.5)
    assert decided.attributes() == {"alarm_decisions": ["fall_back", "lower_lr"], "alarm_lr_factor": 0.5}


def test_a_method_that_replays_the_rollout_has_nothing_to_fall_back_to(batch):
    with pytest.raises(ConfigError, match="decide for one of train, skip, lower_lr"):
        batch.decide(R3, "fall_back", "person")


def test_without_an_alarm_a_commit_says_nothing_of_it():
    decided = Decided.of(GRPO, ())
    assert (decided.config, decided.is_final, decided.skips, decided.lr_factor) == (GRPO, False, False, 1.0)
    assert (decided.metrics(), decided.attributes()) == ({}, {})


def test_the_waiting_batch_of_a_run_is_found(batch):
    assert waiting_batch(batch.store) == batch
    batch.decide(GRPO, "skip", "person")
    assert waiting_batch(batch.store) is None


def test_the_waiting_batch_is_found_though_the_next_was_sampled_already(batch):
    batch.store.begin("rollout", 4, {}, "d").commit()
    assert waiting_batch(batch.store) == batch
    batch.store.begin("training", 3, {}, "d").commit()
    assert waiting_batch(batch.store) is None


def test_a_decision_is_of_one_rollout(batch):
    batch.decide(GRPO, "skip", "person")
    other = BatchAlarms(batch.store, 3, ArtifactRef(uri=batch.rollout.uri, sha256="b" * 64))
    assert (other.decisions(), other.waiting()) == ((), None)


def test_a_damaged_decision_is_refused(batch):
    batch.decide(GRPO, "skip", "person")
    path = batch.store.layout.alarm_file(3, "decision", batch.rollout.sha256, 1)
    batch.store.folder.write(path, b'{"action": "skip"}')
    with pytest.raises(ArchiveCorrupt, match="is no decision"):
        batch.decisions()


def test_a_run_is_complete_without_a_predictor_of_a_batch_that_was_skipped(tmp_path):
    run = make_run(tmp_path, iterations=1, evaluation__benchmarks={})
    for stage in ("rollout", "routes"):
        run.store().begin(stage, 0, {}, "d").commit()
    assert not run.is_complete()
    training = run.store().begin("training", 0, {}, "d").commit(attributes={"alarm_decisions": ["skip"]})
    assert is_skipped(run.open(training))
    assert run.is_complete()
