"""Routing by predicted gates: the choice is that of W + W_p, the weights are those of W.

Shapes: R rows, L MoE layers, E experts, K experts per token, H hidden size.
"""

import pytest
import torch
from families import MOE_LAYERS, ROWS, TOP_K, build, build_plain
from model_steps import (
    assert_same_step,
    backward,
    everywhere,
    foreign_routes,
    forward,
    random_predictor,
    router_gradients,
    router_weights,
    same_sets,
    step,
)

from moe_replay.errors import RoutingMismatch
from moe_replay.routing.routers import Routers

PREDICTED = ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"]


@pytest.mark.parametrize("family", MOE_LAYERS)
def test_the_choice_is_that_of_a_model_with_merged_gates(family: str) -> None:
    model = build_plain(family)
    routers = Routers(model)
    plain = forward(model)
    live_RLK, predictor = routers.live_RLK, random_predictor(routers)

    routers.predict(predictor, everywhere())
    logits = forward(model)

    # Layers after the first see hidden states that depend on the weights over the experts, which differ.
    predicted_RK, first = routers.routed_RLK[:, 0], routers.layers[0]
    assert torch.equal(routers.live_RLK[:, 0], live_RLK[:, 0])
    assert not torch.allclose(logits, plain, atol=1e-3)
    routers.route_live()
    with torch.no_grad():
        router_weights(model, routers)[first].add_(predictor[first])
    forward(model)
    assert same_sets(predicted_RK, routers.live_RLK[:, 0]).all()
    assert not same_sets(predicted_RK, live_RLK[:, 0]).all()


def test_each_layer_predicts_from_the_hidden_states_it_gets() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    predictor, weights = random_predictor(routers), router_weights(model, routers)
    routers.predict(predictor, everywhere())
    routers.watch(everywhere().nonzero()[:, 0])

    forward(model)

    for number, layer in enumerate(routers.layers):
        merged_HE = (weights[layer] + predictor[layer]).T
        want_RK = (routers.features.hidden_SLH[:, number] @ merged_HE).topk(TOP_K, dim=-1).indices
        assert same_sets(routers.routed_RLK[:, number], want_RK).all()
        own_RK = routers.features.logits_SLE[:, number].topk(TOP_K, dim=-1).indices
        assert same_sets(routers.live_RLK[:, number], own_RK).all()


@pytest.mark.parametrize("family", PREDICTED)
def test_replaying_predicted_routes_gives_the_same_step_and_trains_the_live_routers(family: str) -> None:
    model = build_plain(family)
    routers = Routers(model)
    routers.predict(random_predictor(routers), everywhere())
    predicted = step(model)
    routed_RLK, live_RLK = routers.routed_RLK, routers.live_RLK

    routers.replay(routed_RLK, everywhere())

    assert_same_step(step(model), predicted)
    assert torch.equal(routers.live_RLK, live_RLK)
    assert torch.equal(routers.routed_RLK, routed_RLK)
    assert all(gradient.abs().max() > 0 for gradient in router_gradients(routers, predicted[1]).values())


@pytest.mark.parametrize("family", MOE_LAYERS)
def test_a_zero_predictor_is_live_routing_to_the_last_bit(family: str) -> None:
    model = build(family)
    plain = step(model)
    routers = Routers(model)

    routers.predict({layer: weight * 0 for layer, weight in random_predictor(routers).items()}, everywhere())

    assert_same_step(step(model), plain)
    assert torch.equal(routers.routed_RLK, routers.live_RLK)


def test_layers_without_a_predictor_are_routed_live() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.predict({1: random_predictor(routers)[1]}, everywhere())

    forward(model)

    same_L = [same_sets(routers.routed_RLK[:, i], routers.live_RLK[:, i]).all().item() for i in range(3)]
    assert same_L == [True, False, True]


def test_rows_that_are_not_predicted_are_routed_live_and_a_replay_of_the_others_agrees() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    present_R = torch.arange(ROWS) % 3 == 0
    routers.predict(random_predictor(routers), present_R)
    predicted = step(model)
    routed_RLK = routers.routed_RLK

    routers.replay(routed_RLK, present_R)

    assert_same_step(step(model), predicted)
    assert torch.equal(routed_RLK[~present_R], routers.live_RLK[~present_R])
    assert not same_sets(routed_RLK, routers.live_RLK).all()
    for flags_R in (everywhere()[1:], everywhere().repeat(2)):
        routers.predict(random_predictor(routers), flags_R)
        with pytest.raises(RoutingMismatch, match=rf"R={len(flags_R)} rows are predicted or not but 24 reach the"):
            forward(model)


def test_recompute_predicts_as_its_forward_did() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.predict(random_predictor(routers), everywhere())
    want = step(model)
    routed_RLK = routers.routed_RLK

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    assert_same_step(step(model), want)
    assert torch.equal(routers.routed_RLK, routed_RLK)
    logits = forward(model)
    routers.route_live()
    with pytest.raises(RoutingMismatch, match="only after backward"):
        backward(model, logits)


def test_a_predictor_takes_the_place_of_a_replay_and_the_other_way_round() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.predict(random_predictor(routers), everywhere())
    predicted = forward(model)
    ids_RLK = foreign_routes(routers)

    routers.replay(ids_RLK, everywhere())
    forward(model)
    assert torch.equal(routers.routed_RLK, ids_RLK)

    routers.predict(random_predictor(routers), everywhere())
    assert torch.equal(forward(model), predicted)


def test_predictors_of_another_model_are_refused() -> None:
    routers = Routers(build("deepseek_v3"))
    shape = (routers.num_experts, routers.hidden_size)
    for predictor, numbers in [
        ({0: torch.ones(shape)}, r"layers \[1, 2\], but this one has \{0: \[8, 32\]\}"),
        ({1: torch.ones(shape[::-1])}, r"\[E=8, H=32\] .* \{1: \[32, 8\]\}"),
    ]:
        with pytest.raises(RoutingMismatch, match=numbers):
            routers.predict(predictor, everywhere())
