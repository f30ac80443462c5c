"""Fits find the drift that is there, by every objective, and no more of it than their penalty lets them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.routing.fitting import Objective, RouterDrift, Weighted, fit_layer

DIVERGENCES = [(name, optimizer) for name in ("post_routing_kl", "delta_kl") for optimizer in ("lbfgs", "adam")]


def drift_of(weight_EH, num_tokens=400, noise=0.0, seed=0) -> RouterDrift:
    """Tokens whose router moves by h W, and at random besides."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, hidden_size = weight_EH.shape
    hidden_SH = torch.randn(num_tokens, hidden_size, generator=generator)
    old_SE = torch.randn(num_tokens, num_experts, generator=generator)
    moved_SE = noise * torch.randn(num_tokens, num_experts, generator=generator)
    new_SE = (old_SE.double() + hidden_SH.double() @ weight_EH.double().T).float() + moved_SE
    return RouterDrift(hidden_SH, old_SE, new_SE, torch.arange(num_tokens) // 8)


def planted(num_experts=8, hidden_size=12, size=0.05, seed=1):
    return size * torch.randn(num_experts, hidden_size, generator=torch.Generator().manual_seed(seed))


def centred(weight_EH):
    """What of a W routes: adding the same to all experts' logits changes nothing."""
    return weight_EH - weight_EH.mean(0, keepdim=True)


def fit_one(drift, **objective):
    return fit_layer([Weighted(drift, 1.0)], Objective(**objective))


@given(st.integers(2, 24), st.integers(1, 40), st.floats(1e-2, 1.0), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_ridge_recovers_a_planted_linear_drift(num_experts, hidden_size, size, seed):
    weight_EH = planted(num_experts, hidden_size, size, seed)
    found_EH = fit_one(drift_of(weight_EH, seed=seed), ridge=1e-12)
    # As far as float32 logits hold it.
    torch.testing.assert_close(found_EH, centred(weight_EH), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "optimizer"), DIVERGENCES)
def test_divergences_find_a_planted_linear_drift(name, optimizer):
    weight_EH = planted()
    found_EH = fit_one(drift_of(weight_EH), name=name, optimizer=optimizer, ridge=1e-6, steps=300)
    assert ((found_EH - centred(weight_EH)).norm() / centred(weight_EH).norm()).item() < 0.02


@pytest.mark.parametrize(("name", "optimizer"), [("ridge", "lbfgs"), *DIVERGENCES])
def test_the_penalty_shrinks_every_objective_alike(name, optimizer):
    # With white inputs a ridge of λ leaves 1 / (1 + λ) of a drift.
    weight_EH = planted(hidden_size=4)
    found_EH = fit_one(drift_of(weight_EH, num_tokens=4000), name=name, optimizer=optimizer, ridge=1.0)
    left = (found_EH * centred(weight_EH)).sum() / centred(weight_EH).square().sum()
    assert abs(left.item() - 0.5) < 0.05


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_divergences_do_not_depend_on_how_large_drift_or_input_is(size):
    drift = drift_of(planted(size=0.01 * size), noise=0.02 * size)
    drift = drift._replace(hidden_SH=drift.hidden_SH * 100)
    ridge_EH, found_EH = fit_one(drift), fit_one(drift, name="delta_kl")
    assert torch.cosine_similarity(found_EH.flatten(), ridge_EH.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("forgetting", [1.0, 0.5, 0.1])
def test_an_older_iteration_counts_by_its_weight(forgetting):
    # Of equal inputs the fit of a mixture is the mixture of the fits.
    drift = drift_of(planted(seed=1), seed=5)
    other = drift_of(planted(seed=2), seed=5)
    found_EH = fit_layer([Weighted(drift, 1.0), Weighted(other, forgetting)], Objective(ridge=1e-9))
    expected_EH = centred(planted(seed=1) + forgetting * planted(seed=2)) / (1 + forgetting)
    torch.testing.assert_close(found_EH, expected_EH, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "optimizer"), [("ridge", "lbfgs"), *DIVERGENCES])
def test_a_token_of_weight_two_is_two_tokens(name, optimizer):
    drift, other = drift_of(planted(), 60, 0.05, seed=3), drift_of(planted(), 60, 0.05, seed=4)
    objective = Objective(name=name, optimizer=optimizer)
    weighted_EH = fit_layer([Weighted(drift, 2.0), Weighted(other, 1.0)], objective)
    repeated_EH = fit_layer([Weighted(part, 1.0) for part in (drift, drift, other)], objective)
    torch.testing.assert_close(weighted_EH, repeated_EH, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("name", "optimizer"), [("ridge", "lbfgs"), *DIVERGENCES])
def test_where_there_is_nothing_to_learn_the_fit_is_zero(name, optimizer):
    drift = drift_of(planted())
    for nothing in (
        drift._replace(new_SE=drift.old_SE),
        drift._replace(hidden_SH=torch.zeros_like(drift.hidden_SH)),
        drift.where(torch.zeros(len(drift.old_SE), dtype=torch.bool)),
    ):
        assert not fit_one(nothing, name=name, optimizer=optimizer).any()


def test_fewer_tokens_than_dimensions_without_a_ridge_to_speak_of_still_give_a_finite_fit():
    found_EH = fit_one(drift_of(planted(hidden_size=64), num_tokens=10), ridge=1e-300)
    assert found_EH.isfinite().all()
    assert found_EH.any()


@pytest.mark.parametrize(("name", "optimizer"), [("ridge", "lbfgs"), *DIVERGENCES])
def test_the_same_drift_gives_the_same_bits(name, optimizer):
    drift = drift_of(planted(), noise=0.05)
    first, second = (fit_one(drift, name=name, optimizer=optimizer, steps=20) for _ in range(2))
    assert torch.equal(first, second)
    assert math.isfinite(first.sum().item())
