"""Evidence is measured rightly, and only a predictor that truly foretells is used."""

import numpy as np
import pytest
import torch
from test_fitting import drift_of, planted

from moe_replay.routing.evidence import FactorEvidence, LayerEvidence
from moe_replay.routing.fitting import Objective, RouterDrift, Weighted, fit_layer
from moe_replay.routing.judging import clustered_error, judge_layer

FACTORS = (0.25, 0.5, 0.75, 1.0)


def test_the_true_drift_leaves_no_kl_and_agrees_fully():
    weight_EH = planted()
    found = judge_layer(weight_EH, drift_of(weight_EH), (1.0,), top_k=2)
    assert found.kl_zero > 1e-3
    assert found.agreement_zero < 1
    assert found.factors[0].kl < 1e-9
    assert found.factors[0].agreement == 1
    assert found.choice(2.0) == 1.0


def test_means_and_changes_fit_together():
    found = judge_layer(planted(seed=8), drift_of(planted(), noise=0.1), FACTORS, top_k=3)
    for one in found.factors:
        assert one.kl - one.kl_change == pytest.approx(found.kl_zero, abs=1e-12)
        assert one.agreement - one.agreement_change == pytest.approx(found.agreement_zero, abs=1e-12)
    assert (found.tokens, found.groups) == (400, 50)


def test_kl_is_that_of_the_gate_distributions():
    drift = drift_of(planted(), noise=0.1)
    new, old = (torch.softmax(part.double(), -1) for part in (drift.new_SE, drift.old_SE))
    expected = (new * (new.log() - old.log())).sum(-1).mean().item()
    assert judge_layer(None, drift, FACTORS, 2).kl_zero == pytest.approx(expected, rel=1e-9)


def test_without_a_predictor_there_is_nothing_to_choose():
    found = judge_layer(None, drift_of(planted()), FACTORS, 2)
    assert found.factors == ()
    assert found.choice(0.0) == 0


@pytest.mark.parametrize("num_groups", [6, 20])
@pytest.mark.parametrize("hidden_size", [2, 8, 24])
def test_a_fit_of_noise_is_used_less_often_than_the_error_asked_for_allows(num_groups, hidden_size):
    """Though the tokens of a prompt move alike here, and look like more evidence than they are."""
    fits, used = 100, 0
    for seed in range(fits):
        old, new = (_noise(2 * seed + part, num_groups, hidden_size) for part in (0, 1))
        weight_EH = fit_layer([Weighted(old, 1.0)], Objective())
        used += judge_layer(weight_EH, new, FACTORS, 2).choice(2.0) > 0
    # Two standard errors of one normal number; KL and agreement both have to be fooled.
    assert used <= 0.023 * fits


def _noise(seed, num_groups, hidden_size) -> RouterDrift:
    rng = np.random.default_rng(seed)
    group_S = np.repeat(np.arange(num_groups), 8)
    hidden_SH = rng.normal(size=(num_groups, hidden_size))[group_S] + 0.5 * rng.normal(size=(len(group_S), hidden_size))
    old_SE = rng.normal(size=(len(group_S), 8))
    drift_SE = 0.1 * rng.normal(size=(num_groups, 8))[group_S] + 0.05 * rng.normal(size=old_SE.shape)
    parts = (torch.from_numpy(part.astype(np.float32)) for part in (hidden_SH, old_SE, old_SE + drift_SE))
    return RouterDrift(*parts, torch.from_numpy(group_S))


def test_a_drift_that_turned_round_is_not_used():
    weight_EH = fit_layer([Weighted(drift_of(planted()), 1.0)], Objective())
    assert judge_layer(weight_EH, drift_of(-planted()), FACTORS, 2).choice(0.0) == 0


def test_a_fit_that_is_too_large_is_shrunk():
    assert judge_layer(2 * planted(), drift_of(planted(), noise=0.02), FACTORS, 2).choice(2.0) == 0.5


def test_more_evidence_is_asked_for_than_chance_gives():
    found = judge_layer(planted(), drift_of(0.1 * planted(), noise=0.02, num_tokens=64), (0.05,), 2)
    [one] = found.factors
    assert one.kl_change_error is not None
    needed = -one.kl_change / one.kl_change_error
    if one.agreement_change > 0:
        assert (found.choice(needed * 0.99), found.choice(needed * 1.01)) == (0.05, 0)


@pytest.mark.parametrize(
    ("kl_change", "error", "agreement_change", "factor"),
    [
        (-0.3, 0.1, 0.01, 1.0),
        (-0.3, 0.1, 0.0, 0.0),
        (-0.3, 0.1, -0.01, 0.0),
        (-0.3, 0.15, 0.01, 0.0),
        (-0.3, None, 0.01, 0.0),
        (0.0, 0.0, 0.01, 0.0),
        (0.3, 0.1, 0.01, 0.0),
    ],
)
def test_a_layer_is_used_only_when_kl_and_agreement_both_say_so(kl_change, error, agreement_change, factor):
    one = FactorEvidence(
        factor=1.0,
        kl=1 + kl_change,
        kl_change=kl_change,
        kl_change_error=error,
        agreement=0.9,
        agreement_change=agreement_change,
        agreement_change_error=error,
    )
    layer = LayerEvidence(tokens=10, groups=3, kl_zero=1, agreement_zero=0.9 - agreement_change, factors=(one,))
    assert layer.choice(2.0) == factor


def test_the_error_of_independent_tokens_is_the_usual_one():
    values_S = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = values_S.std(correction=1).item() / 200**0.5
    assert clustered_error(values_S, torch.arange(200)) == pytest.approx(expected, rel=1e-12)


def test_tokens_that_repeat_one_another_are_one_token():
    values_G = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = clustered_error(values_G, torch.arange(40))
    assert clustered_error(values_G.repeat_interleave(8), torch.arange(40).repeat_interleave(8)) == pytest.approx(once)


def test_one_prompt_gives_no_error_to_trust():
    assert clustered_error(torch.arange(5.0), torch.zeros(5, dtype=torch.int64)) is None


def evidence_of(kl_change: float, error: float, agreement_change: float) -> LayerEvidence:
    one = FactorEvidence(
        factor=0.5,
        kl=1 + kl_change,
        kl_change=kl_change,
        kl_change_error=error,
        agreement=0.9 + agreement_change,
        agreement_change=agreement_change,
        agreement_change_error=error,
    )
    return LayerEvidence(tokens=10, groups=2, kl_zero=1.0, agreement_zero=0.9, factors=(one,))


def test_pooled_evidence_is_the_mean_of_independent_iterations():
    pooled = evidence_of(-0.3, 0.1, 0.0)
    for kl_change in (-0.1, 0.1, -0.5):
        pooled = evidence_of(kl_change, 0.1, 0.02).after(pooled, memory=1.0)
    one = pooled.factors[0]
    assert one.kl_change == pytest.approx(-0.2)
    assert one.kl_change_error == pytest.approx(0.1 / 2)
    assert one.agreement_change == pytest.approx(0.015)
    assert (pooled.weight, pooled.tokens, pooled.groups) == (4.0, 40, 8)


def test_what_is_older_weighs_less():
    pooled = evidence_of(-0.3, 0.1, 0.0).after(evidence_of(0.3, 0.1, 0.0), memory=0.5)
    assert pooled.factors[0].kl_change == pytest.approx((-0.3 + 0.5 * 0.3) / 1.5)
    assert evidence_of(-0.3, 0.1, 0.0).after(evidence_of(0.3, 0.1, 0.0), memory=0.0) == evidence_of(-0.3, 0.1, 0.0)


def test_one_bad_iteration_does_not_undo_what_many_showed():
    pooled = evidence_of(-0.2, 0.05, 0.01)
    for _ in range(5):
        pooled = evidence_of(-0.2, 0.05, 0.01).after(pooled, memory=0.9)
    lapsed = evidence_of(0.2, 0.05, -0.01)
    assert lapsed.choice(2.0) == 0.0
    assert lapsed.after(pooled, memory=0.9).choice(2.0) == 0.5


def test_evidence_on_other_factors_is_forgotten():
    other = evidence_of(-0.2, 0.05, 0.01)
    other = other.model_copy(update={"factors": (other.factors[0].model_copy(update={"factor": 0.25}),)})
    newest = evidence_of(-0.1, 0.05, 0.01)
    assert newest.after(other, memory=0.9) == newest
