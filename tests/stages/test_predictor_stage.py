"""The stage between training and rollout: what it commits, what it uses, what it refuses."""

import json
from datetime import timedelta

import pytest
import torch
from predictor_samples import (
    GROUPS,
    HIDDEN,
    LAYERS,
    ORIGIN,
    PLANTED,
    RANDOM,
    ROWS,
    STEPS,
    make_run,
    planted,
    train,
    train_and_fit,
)

from moe_replay.archive.removal import remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.errors import ArchiveCorrupt, ConfigError, RoutingMismatch
from moe_replay.reports.predictor_report import read_report
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.stages.predictor import fit_predictor, inputs_of, last_with_evolution, refit

KEYS = {f"predictor/{name}" for name in ("kl", "kl_zero", "agreement", "agreement_zero", "layers_used", "bias_ratio")}


def predictor_in(run, ref, name="predictor.safetensors") -> EvolutionPredictor:
    return EvolutionPredictor.from_bytes(run.open(ref).read_bytes(name), name)


def metrics_of(run, ref) -> dict[str, float]:
    return run.open(ref).commit.metrics


def test_the_layer_that_can_be_foretold_is_used_from_the_second_fit_on(tmp_path):
    run = make_run(tmp_path)
    predictors = train_and_fit(run, 3)
    assert [list(predictor_in(run, ref).weights) for ref in predictors] == [[], [PLANTED], [PLANTED]]
    assert list(predictor_in(run, predictors[0], "fitted.safetensors").weights) == list(LAYERS)
    found_EH, truth_EH = predictor_in(run, predictors[-1]).weights[PLANTED], torch.from_numpy(planted()).float()
    assert torch.cosine_similarity(found_EH.flatten(), (truth_EH - truth_EH.mean(0)).flatten(), dim=0) > 0.9


def test_the_first_fit_is_judged_by_nothing_and_uses_nothing(tmp_path):
    run = make_run(tmp_path)
    [first] = train_and_fit(run, 1)
    metrics = metrics_of(run, first)
    assert metrics.keys() == KEYS
    assert metrics["predictor/kl"] == metrics["predictor/kl_zero"] > 0
    assert metrics["predictor/agreement"] == metrics["predictor/agreement_zero"]
    assert (metrics["predictor/layers_used"], metrics["predictor/bias_ratio"]) == (0, 0)


def test_metrics_tell_how_the_predictor_that_was_served_did(tmp_path):
    run = make_run(tmp_path)
    predictors = train_and_fit(run, 3)
    served_at = [metrics_of(run, ref) for ref in predictors]
    assert served_at[1]["predictor/kl"] == served_at[1]["predictor/kl_zero"]
    assert served_at[2]["predictor/kl"] < 0.9 * served_at[2]["predictor/kl_zero"]
    assert served_at[2]["predictor/agreement"] > served_at[2]["predictor/agreement_zero"]
    assert served_at[2]["predictor/bias_ratio"] > 0


def test_the_report_has_the_evidence_for_every_factor(tmp_path):
    run = make_run(tmp_path)
    train_and_fit(run, 2)
    report = read_report(run.store(), None)
    foretold, random = report.layers
    assert (report.iteration, [foretold.layer, random.layer]) == (1, list(LAYERS))
    assert [one.factor for one in foretold.judged.factors] == [0.25, 0.5, 0.75, 1.0]
    assert (foretold.judged.tokens, foretold.judged.groups) == (ROWS * len(STEPS), GROUPS)
    assert foretold.factor > 0
    assert (random.layer, random.factor, random.mean_bias) == (RANDOM, 0, 0)


@pytest.mark.parametrize("settings", [{}, {"predictor__judged_on": "held_out", "predictor__window": 2}])
def test_equal_inputs_give_equal_commits(tmp_path, settings):
    runs = [make_run(tmp_path / name, **settings) for name in "ab"]
    assert train_and_fit(runs[0], 2) == train_and_fit(runs[1], 2)


def test_prompts_left_out_can_judge_the_first_fit_already(tmp_path):
    run = make_run(tmp_path, predictor__judged_on="held_out")
    [first] = train_and_fit(run, 1)
    report = read_report(run.store(), 0)
    assert list(predictor_in(run, first).weights) == [PLANTED]
    assert report.layers[0].judged.groups == GROUPS // 4
    whole_EH = predictor_in(run, first, "fitted.safetensors").weights[PLANTED]
    used_EH = predictor_in(run, first).weights[PLANTED]
    torch.testing.assert_close(used_EH, whole_EH * report.layers[0].factor)


def test_a_drift_that_does_not_last_is_never_served(tmp_path):
    run = make_run(tmp_path)
    trainings, before = [], None
    for iteration in range(3):
        trainings.append(train(run, iteration, strength=(-1) ** iteration))
        before = fit_predictor(run, iteration, trainings[-1:], before)
        assert predictor_in(run, before).weights == {}


def test_a_window_is_fitted_with_older_iterations_counting_less(tmp_path):
    whole, single = (make_run(tmp_path / str(n), predictor__window=n, predictor__forgetting=1e-9) for n in (2, 1))
    fits = [predictor_in(run, train_and_fit(run, 2)[-1], "fitted.safetensors") for run in (whole, single)]
    torch.testing.assert_close(fits[0].weights[PLANTED], fits[1].weights[PLANTED])
    assert [len(fit.provenance.evolution) for fit in fits] == [2, 1]
    assert read_report(whole.store(), 1).fitted_iterations == (1, 0)


def expire(run, iterations_kept: int | None = None, checkpoints: bool = False) -> None:
    retention = Retention(keep_iterations=iterations_kept, keep_last_checkpoint=checkpoints)
    for removable in find_removable(run.store(), retention, timedelta(0)).removable:
        remove(run.root, removable)


def test_what_retention_removed_is_left_out_and_counted_and_what_the_fit_needs_is_kept(tmp_path):
    run = make_run(tmp_path, predictor__window=3)
    [*_, before] = train_and_fit(run, 2)
    trainings = [train(run, 2), *(run.store().commit_of("training", n) for n in (1, 0))]
    expire(run, iterations_kept=1)  # between a training and its fit
    ref = fit_predictor(run, 2, trainings, before)
    report = read_report(run.store(), 2)
    assert (report.fitted_iterations, report.removed_iterations) == ((2, 1), 1)
    assert metrics_of(run, ref).keys() == KEYS
    assert report.layers[0].judged.factors


def test_an_iteration_that_lost_its_checkpoint_alone_is_fitted(tmp_path):
    run = make_run(tmp_path, predictor__window=2)
    [before] = train_and_fit(run, 1)
    trainings = [train(run, 1), run.store().commit_of("training", 0)]
    expire(run, checkpoints=True)
    fit_predictor(run, 1, trainings, before)
    assert read_report(run.store(), 1).fitted_iterations == (1, 0)


def test_a_stale_or_foreign_predictor_is_refused(tmp_path):
    run, other = make_run(tmp_path), make_run(tmp_path, "run-2")
    stale = train_and_fit(run, 2)[0]
    with pytest.raises(RoutingMismatch, match="fitted in run run-1, iteration 0, expected run run-1, iteration 1"):
        fit_predictor(run, 2, [train(run, 2)], stale)
    train_and_fit(other, 2)
    elsewhere = other.store().commit_of("predictor", 1)
    foreign = elsewhere.model_copy(update={"uri": f"{other.store().name}/{elsewhere.uri}"})
    with pytest.raises(RoutingMismatch, match="fitted in run run-2"):
        fit_predictor(run, 2, [run.store().commit_of("training", 2)], foreign)
    assert run.store().commit_of("predictor", 2) is None


def test_evolution_of_another_iteration_is_refused(tmp_path):
    run = make_run(tmp_path)
    trainings = [train(run, n) for n in range(2)]
    with pytest.raises(RoutingMismatch, match="newest evolution is of run run-1, iteration 0"):
        fit_predictor(run, 1, trainings[:1], None)
    with pytest.raises(RoutingMismatch, match="the newest first"):
        fit_predictor(run, 1, [trainings[1], trainings[1]], None)


@pytest.mark.parametrize("change", [{"num_experts": 9}, {"hidden_size": HIDDEN + 1}, {"layers": (1, 4)}])
def test_evolution_of_another_model_is_refused(tmp_path, change):
    run = make_run(tmp_path)
    [before] = train_and_fit(run, 1)
    changed = train(run, 1, ORIGIN.model_copy(update=change))
    with pytest.raises(RoutingMismatch, match="is of a model with"):
        fit_predictor(run, 1, [changed], before)
    with pytest.raises(RoutingMismatch, match="is of a model with"):
        fit_predictor(run, 1, [changed, run.store().commit_of("training", 0)], None)


def test_an_altered_predictor_is_refused(tmp_path):
    run = make_run(tmp_path)
    [before] = train_and_fit(run, 1)
    path = tmp_path / "run-1" / before.uri / "fitted.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArchiveCorrupt, match="was altered"):
        fit_predictor(run, 1, [train(run, 1)], before)


def test_a_training_without_evolution_is_refused(tmp_path):
    run = make_run(tmp_path)
    writer = run.store().begin("training", 0, {}, "d")
    writer.write_bytes("checkpoint/model", b"x")
    with pytest.raises(ArchiveCorrupt, match="no readable zarr group"):
        fit_predictor(run, 0, [writer.commit()], None)
    with pytest.raises(ConfigError, match=r"evolution\.record = true"):
        last_with_evolution(run.store())


def test_a_commit_is_found_again_by_its_inputs(tmp_path):
    run = make_run(tmp_path)
    first, second = train_and_fit(run, 2)
    training = run.store().commit_of("training", 1)
    assert run.find("predictor", 1, inputs_of([training], first)) == second
    with pytest.raises(ConfigError, match="previous differ"):
        run.find("predictor", 1, inputs_of([training], None))


@pytest.mark.parametrize("judged_on", ["next_iteration", "held_out"])
def test_fitting_again_gives_the_bytes_of_the_run(tmp_path, judged_on):
    run = make_run(tmp_path, predictor__judged_on=judged_on, predictor__window=2)
    [*_, last] = train_and_fit(run, 4)
    committed = {stored.path: run.open(last).read_bytes(stored.path) for stored in run.open(last).commit.objects}
    assert refit(run.store(), run.config.predictor, 3, use_stored=True).objects() == committed


def test_other_settings_are_judged_as_a_run_of_them_would_be(tmp_path):
    run, other = make_run(tmp_path), make_run(tmp_path / "other", predictor__ridge=1.0)
    train_and_fit(run, 3)
    train_and_fit(other, 3)
    found = refit(run.store(), other.config.predictor, 2, use_stored=False)
    theirs = read_report(other.store(), 2)
    assert found.report == theirs
    assert json.loads(found.objects()["report.json"])["objective"] == "ridge"
