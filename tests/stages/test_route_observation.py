"""What is gathered of an iteration's routes, by layer and in the metrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.engines.training import Pass
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.route_observation import RouteObservation


def trace(ids: list, num_experts: int = 10, valid: list[bool] | None = None) -> RoutingTrace:
    ids_TLK = np.array(ids, dtype=np.uint8)
    valid_T = np.ones(len(ids), dtype=bool) if valid is None else np.array(valid)
    ids_TLK[~valid_T] = 0
    return RoutingTrace(ids_TLK, valid_T, num_experts, tuple(range(ids_TLK.shape[1])))


def seen(live: list, gap: float = 0.1) -> Pass:
    live_TLK = torch.tensor(live, dtype=torch.int32)
    return Pass(
        log_probs_NS=torch.zeros(1, 1),
        entropy_NS=None,
        live_TLK=live_TLK,
        loss=0.0,
        grad_norm=0.0,
        coverage_gap_TL=torch.full(live_TLK.shape[:2], gap),
    )


def routes(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int) -> list:
    scores = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return scores.argsort(-1)[..., :top_k].tolist()


def test_mismatch_counts_layers_tokens_and_layers_per_token():
    rollout = [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]]]
    trainer = [[[1, 0], [3, 2]], [[0, 1], [2, 4]], [[0, 5], [5, 4]], [[9, 8], [9, 8]]]
    observation = RouteObservation((0, 1), 10)
    for part in (slice(0, 2), slice(2, 4)):  # mini-batches, the last token without a route
        valid = [True, True] if part.start == 0 else [True, False]
        observation.add_old_pass([trace(rollout[part], valid=valid)], seen(trainer[part]))
    metrics, statistics = observation.metrics(), observation.statistics()
    assert metrics["mismatch/router_fraction"] == pytest.approx(3 / 6)
    assert metrics["mismatch/token_fraction"] == pytest.approx(2 / 3)
    assert metrics["mismatch/routers_per_token"] == pytest.approx(1.0)
    assert metrics["routing/missing_fraction"] == pytest.approx(1 / 4)
    assert statistics.router_fraction_L == pytest.approx((1 / 3, 2 / 3))
    assert statistics.differing_layers_B == (1, 1, 1)
    assert [sum(load) for load in statistics.load_LE] == [6, 6]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(2, 12), st.integers(0, 99), st.data())
def test_deviations_are_a_histogram_whose_first_bin_is_full_agreement(num_tokens, num_layers, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    replayed, live = (routes(num_tokens, num_layers, num_experts, top_k, seed + i) for i in (0, 100))
    observation = RouteObservation(tuple(range(num_layers)), num_experts)
    observation.add_old_pass([trace(replayed, num_experts)], seen(live))
    found = observation.add_mini_step([trace(replayed, num_experts)], seen(live))
    shares = [found[f"routing/deviation_{name}"] for name in ("0", "1", "2", "3plus")]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(1 - observation.metrics()["mismatch/router_fraction"])
    common = [len({*a} & {*b}) / top_k for x, y in zip(replayed, live, strict=True) for a, b in zip(x, y, strict=True)]
    assert found["routing/agreement"] == pytest.approx(np.mean(common))
    assert found["routing/coverage_gap"] == pytest.approx(0.1)


def test_a_coverage_gap_that_the_routers_do_not_tell_is_left_out():
    observation = RouteObservation((0,), 10)
    observation.add_old_pass([trace([[[0, 1]]])], seen([[[0, 1]]]))
    found = observation.add_mini_step([trace([[[0, 1]]])], seen([[[0, 1]]], gap=float("nan")))
    assert "routing/coverage_gap" not in found
    assert observation.statistics().mini_steps[0].coverage_gap_L == ()


def test_all_methods_are_compared_on_the_rows_that_the_rollout_has_routes_of():
    observation = RouteObservation((0,), 10)
    observation.add_old_pass([trace([[[0, 1]], [[2, 3]]], valid=[True, False])], seen([[[0, 1]], [[2, 3]]]))
    own = trace([[[0, 1]], [[2, 3]]])  # the trainer chose for the last token too
    found = observation.add_mini_step([own], seen([[[0, 1]], [[8, 9]]]))
    assert found["routing/agreement"] == 1.0


def test_a_mini_step_without_any_route_is_refused():
    observation = RouteObservation((0,), 10)
    observation.add_old_pass([trace([[[0, 1]]], valid=[False])], seen([[[0, 1]]]))
    with pytest.raises(RoutingMismatch, match="none of the 1 tokens of mini-step 1 has a recorded route"):
        observation.add_mini_step([trace([[[0, 1]]], valid=[False])], seen([[[0, 1]]]))
