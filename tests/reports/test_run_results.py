"""A run's results as they are read back from storage."""

import shutil
from datetime import timedelta

import numpy as np
import pytest
from run_samples import CONFIG, DIGEST, add_iteration, in_memory, make_run

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import IMPORTS_KEY
from moe_replay.archive.log_probs import LogProbs
from moe_replay.archive.removal import remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.reports.extremes import THRESHOLDS_B, ExtremeCurve
from moe_replay.reports.runs import RunReader, read_results
from moe_replay.routing.statistics import ROUTING_FILE


def test_results_hold_what_the_run_is_and_what_each_iteration_committed():
    results = read_results(make_run(in_memory(), "a", "r3", seed=7, label="r3+policy_loss=gspo"))
    assert (results.run_id, results.method, results.seed) == ("a", "r3+policy_loss=gspo", 7)
    assert (results.mini_steps, results.model) == (2, "embedded")
    assert [part.iteration for part in results.iterations] == [0, 1, 2, 3]
    first = results.iterations[0]
    assert {"mismatch/kl_k3", "reward/mean", "eval/addition/avg_at_n", "time/training"} <= first.metrics.keys()
    assert first.routing.layers == (1, 2, 5)
    assert first.extremes.tokens == 80


def test_iterations_without_a_training_are_left_out_and_told():
    store = make_run(in_memory(), "a", iterations=2)
    store.begin("rollout", 2, {}, DIGEST).commit()
    store.begin("rollout", 4, {}, DIGEST).write_bytes("part", b"half")
    results = read_results(store)
    assert len(results.iterations) == 2
    assert results.incomplete == (2, 4)


def test_an_iteration_counts_before_it_is_evaluated():
    store = make_run(in_memory(), "a", iterations=1)
    store.begin("rollout", 1, {}, DIGEST).commit({"reward/mean": 0.5})
    store.begin("training", 1, {}, DIGEST).commit({"mismatch/kl_k3": 0.1})
    results = read_results(store)
    assert results.iterations[1].metrics["mismatch/kl_k3"] == 0.1
    assert results.without_routing == (1,)


def test_a_reader_follows_a_run_and_reads_final_iterations_once(tmp_path):
    store = make_run(tmp_path, "a", iterations=2)
    store.begin("training", 2, {}, DIGEST).commit({"mismatch/kl_k3": 0.1})
    reader = RunReader(store)
    first = reader.read(extremes=False)
    assert first == read_results(store, extremes=False)
    store.begin("evaluation", 2, {}, DIGEST).commit({"eval/addition/avg_at_n": 0.5})
    add_iteration(store, 3, np.random.default_rng(3), 2, 1.0, "r3")
    # Only what is read again could miss them.
    for iteration in (0, 1):
        shutil.rmtree(tmp_path / f"a/iterations/{iteration:05d}/training")
    later = reader.read(extremes=False)
    assert [part.iteration for part in later.iterations] == [0, 1, 2, 3]
    assert all(kept is part for kept, part in zip(later.iterations[:2], first.iterations[:2], strict=True))
    assert later.iterations[2].metrics["eval/addition/avg_at_n"] == 0.5
    assert (later.method, later.incomplete) == ("r3", ())


def test_a_reader_takes_nothing_for_final_that_is_still_to_be_made_again(tmp_path):
    store = make_run(tmp_path, "a", iterations=3)
    shutil.rmtree(tmp_path / "a/iterations/00001/evaluation")
    reader = RunReader(store)
    first = reader.read(extremes=False, settled=1)
    store.begin("evaluation", 1, {}, DIGEST).commit({"eval/addition/avg_at_n": 0.25})
    later = reader.read(extremes=False, settled=3)
    assert later.iterations[1].metrics["eval/addition/avg_at_n"] == 0.25
    assert later.iterations[0] is first.iterations[0]


def test_what_retention_removed_leaves_the_metrics(tmp_path):
    store = make_run(tmp_path, "a", iterations=3)
    findings = find_removable(store, Retention(keep_iterations=1), grace=timedelta(0))
    for removable in findings.removable:
        remove(str(tmp_path), removable)
    results = read_results(store)
    assert results.without_routing == (0, 1)
    assert all("mismatch/kl_k3" in part.metrics for part in results.iterations)
    assert [part.extremes is None for part in results.iterations] == [True, True, False]


@pytest.mark.parametrize(
    ("document", "error", "told"),
    [
        ({IMPORTS_KEY: True}, ConfigError, "imported"),
        ({"config": CONFIG}, ArchiveCorrupt, "model_sha256"),
        ({"config": {"seed": "x"}}, ArchiveCorrupt, "config.seed"),
    ],
)
def test_other_documents_than_a_training_runs_are_refused(document, error, told):
    store = RunStore(in_memory(), "a")
    store.create_run(document)
    with pytest.raises(error, match=told):
        read_results(store)


def test_a_run_without_a_completed_iteration_has_nothing_to_report():
    store = make_run(in_memory(), "a", iterations=0)
    with pytest.raises(ConfigError, match="completed no iteration"):
        read_results(store)


def test_statistics_that_are_none_are_told_by_object():
    store = make_run(in_memory(), "a", iterations=0)
    training = store.begin("training", 0, {}, DIGEST)
    training.write_bytes(ROUTING_FILE, b'{"layers": [1]}')
    training.commit()
    with pytest.raises(ArchiveCorrupt, match=r"training/routing.json"):
        read_results(store)


def test_an_altered_object_is_told(tmp_path):
    store = make_run(tmp_path, "a", iterations=0)
    add_iteration(store, 0, np.random.default_rng(0), 2, 1.0, "grpo")
    (tmp_path / "a/iterations/00000/training" / ROUTING_FILE).write_bytes(b"{}")
    with pytest.raises(ArchiveCorrupt, match=ROUTING_FILE):
        read_results(store)


def test_labels_can_control_no_terminal():
    results = read_results(make_run(in_memory(), "a", iterations=1, label="r3\x1b[31m\nx"))
    assert results.method == "r3?[31m?x"


def test_extreme_tokens_are_counted_by_threshold_in_either_direction():
    rollout_T = np.log(np.array([0.1, 0.1, 0.4, 0.4], dtype=np.float32))
    old_T = np.log(np.array([0.1, 0.25, 0.1, 0.41], dtype=np.float32))  # ratios 1, 2.5, 4, 1.025
    curve = ExtremeCurve.of(LogProbs(rollout_T, old_T))
    expected = [sum(ratio > threshold for ratio in (1, 2.5, 4, 1.025)) for threshold in THRESHOLDS_B]
    assert curve.above_B.tolist() == expected
    both = ExtremeCurve.joined([curve, curve])
    assert both.tokens == 8
    assert np.array_equal(both.shares, curve.shares)
