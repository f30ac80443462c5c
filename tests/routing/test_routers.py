"""Routers of live transformers models: record, replay, recompute, refuse.

Shapes: R rows, L MoE layers, K experts per token, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import CORE, EXPERTS, MOE_LAYERS, ROWS, TOP_K, build
from model_steps import (
    assert_same_step,
    backward,
    everywhere,
    foreign_routes,
    forward,
    router_gradients,
    step,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.routers import Routers

every_family = pytest.mark.parametrize("family", MOE_LAYERS)
core_family = pytest.mark.parametrize("family", CORE)


@every_family
def test_replaying_recorded_routes_is_bit_exact(family: str) -> None:
    model = build(family)
    plain = step(model)
    routers = Routers(model)
    assert_same_step(step(model), plain)  # recording alone changes nothing
    live_RLK = routers.live_RLK

    routers.replay(live_RLK, everywhere())

    assert_same_step(step(model), plain)
    assert torch.equal(routers.live_RLK, live_RLK)


@every_family
def test_model_shape_is_read_from_the_live_model(family: str) -> None:
    routers = Routers(build(family))

    assert (routers.num_experts, routers.top_k, routers.layers) == (EXPERTS, TOP_K, MOE_LAYERS[family])


@every_family
def test_foreign_routes_change_outputs_and_still_train_the_routers(family: str) -> None:
    model = build(family)
    routers = Routers(model)
    plain = forward(model)
    live_RLK = routers.live_RLK

    routers.replay(foreign_routes(routers), everywhere())
    logits, gradients = step(model)

    assert not torch.allclose(logits, plain, atol=1e-3)
    assert all(gradient.abs().max() > 0 for gradient in router_gradients(routers, gradients).values())
    assert torch.equal(routers.live_RLK[:, 0], live_RLK[:, 0])  # no replay before the first MoE layer
    assert len(routers.layers) == 1 or not torch.equal(routers.live_RLK[:, -1], live_RLK[:, -1])


@core_family
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_same_routes(family: str, reentrant: bool) -> None:
    model = build(family)
    routers = Routers(model)
    routers.replay(foreign_routes(routers), everywhere())
    want = step(model)
    live_RLK = routers.live_RLK

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_step(step(model), want)

    assert torch.equal(routers.live_RLK, live_RLK)


def test_checkpoint_around_the_whole_model_keeps_live_routes() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.replay(foreign_routes(routers), everywhere())
    want = step(model)
    live_RLK = routers.live_RLK

    logits = checkpoint(forward, model, use_reentrant=False)

    assert_same_step((logits.detach(), backward(model, logits)), want)
    assert torch.equal(routers.live_RLK, live_RLK)


def test_recompute_under_other_targets_than_its_forward_is_refused() -> None:
    model = build("qwen3_moe")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    routers = Routers(model)
    routers.replay(foreign_routes(routers), everywhere())
    logits = forward(model)

    routers.route_live()

    with pytest.raises(RoutingMismatch, match=r"decoder layer 2 .* number 2, .* number 1: .* after backward"):
        backward(model, logits)


@core_family
def test_absent_rows_are_routed_live(family: str) -> None:
    model = build(family)
    plain = step(model)
    routers = Routers(model)
    invalid_RLK = torch.full((ROWS, len(routers.layers), TOP_K), -1)

    routers.replay(invalid_RLK, ~everywhere())

    assert_same_step(step(model), plain)


@core_family
def test_present_rows_are_replayed_and_absent_rows_are_not(family: str) -> None:
    model = build(family)
    routers = Routers(model)
    forward(model)
    live_RLK, target_RLK = routers.live_RLK, foreign_routes(routers)
    present_R = torch.arange(ROWS) % 3 == 0

    routers.replay(target_RLK, present_R)
    got = step(model)

    # The same as naming every row's experts, with the live ones of this forward where none were given.
    complete_RLK = torch.where(present_R[:, None, None], target_RLK, routers.live_RLK)
    assert torch.equal(complete_RLK[~present_R][:, 0], live_RLK[~present_R][:, 0])
    routers.replay(complete_RLK, everywhere())
    assert_same_step(got, step(model))


def test_route_live_ends_a_replay() -> None:
    model = build("qwen3_moe")
    plain = step(model)
    routers = Routers(model)
    routers.replay(foreign_routes(routers), everywhere())
    forward(model)

    routers.route_live()

    assert_same_step(step(model), plain)


@core_family
def test_order_of_target_ids_does_not_matter(family: str) -> None:
    model = build(family)
    routers = Routers(model)
    ids_RLK = foreign_routes(routers)
    routers.replay(ids_RLK, everywhere())
    logits, gradients = step(model)

    routers.replay(ids_RLK.flip(-1), everywhere())
    flipped_logits, flipped_gradients = step(model)

    torch.testing.assert_close(flipped_logits, logits, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(flipped_gradients[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_dense_models_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"no router .* dense models have no routes"):
        Routers(build(family))


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("phimoe", {}, r"model\.layers\.0\.mlp\.router \(PhimoeTopKRouter\) makes none"),
        ("jetmoe", {}, "layer 0 has another at"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "zeroes those outside the live groups"),
    ],
)
def test_families_that_replay_cannot_serve_are_refused(family: str, overrides: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Routers(build(family, **overrides))


def test_one_expert_group_is_not_taken_for_the_selection() -> None:
    model = build("deepseek_v3", n_group=1, topk_group=1)  # scores its group by topk(2) over [R, 1, E]
    plain = step(model)
    routers = Routers(model)
    forward(model)

    routers.replay(routers.live_RLK, everywhere())

    assert_same_step(step(model), plain)


def test_layers_that_disagree_in_experts_are_refused() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.gate.weight = nn.Parameter(torch.zeros(EXPERTS + 1, 32))

    with pytest.raises(ConfigError, match=r"same num_experts, found \[8, 9\]"):
        Routers(model)


def test_routes_that_do_not_fit_the_model_are_refused_with_numbers() -> None:
    routers = Routers(build("deepseek_v3"))
    fitting_RLK = foreign_routes(routers)
    too_high_RLK = fitting_RLK.clone()
    too_high_RLK[5, 1, 0] = EXPERTS
    repeated_RLK = fitting_RLK.clone()
    repeated_RLK[4] = 0

    for ids_RLK, present_R, message in [
        (fitting_RLK[:, :1], everywhere(), r"\[24, 1, 2\] .* L=2, K=2\] \(decoder layers \[1, 2\]\)"),
        (fitting_RLK[..., :1], everywhere(), r"\[24, 2, 1\] .* L=2, K=2\]"),
        (too_high_RLK, everywhere(), r"ids span 0\.\.8 .* E=8 \(0\.\.7\)"),
        (fitting_RLK - 1, everywhere(), r"ids span -1\.\.6"),
        (repeated_RLK, everywhere(), r"2 of 48 \(row, layer\) repeat one"),
        (fitting_RLK, everywhere()[1:], r"\[23\] .* R=24 rows"),
        (fitting_RLK.int(), everywhere(), r"torch\.int32 and torch\.bool"),
    ]:
        with pytest.raises(RoutingMismatch, match=message):
            routers.replay(ids_RLK, present_R)


def test_rows_that_differ_from_the_micro_batch_are_refused_in_forward() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.replay(foreign_routes(routers)[1:], everywhere()[1:])

    with pytest.raises(RoutingMismatch, match="R=23 rows but 24 reach the router of decoder layer 0"):
        forward(model)


def test_live_routes_need_a_whole_forward() -> None:
    model = build("deepseek_v3")
    routers = Routers(model)
    with pytest.raises(RoutingMismatch, match=r"2 of 2 MoE layers have not fired \(decoder layers \[1, 2\]\)"):
        _ = routers.live_RLK

    model.model.layers[2].mlp.experts.register_forward_pre_hook(_fail)
    with pytest.raises(KeyError):
        forward(model)
    model.model.layers[2].mlp.experts._forward_pre_hooks.clear()
    forward(model)

    assert routers.live_RLK.shape == (ROWS, 2, TOP_K)


def _fail(*_: object) -> None:
    raise KeyError("a crash inside an MoE block")


def test_a_crash_in_a_forward_leaves_topk_alone() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.replay(foreign_routes(routers), everywhere())
    model.model.layers[1].mlp.experts.register_forward_pre_hook(_fail)
    with pytest.raises(KeyError):
        forward(model)

    scores_RE = torch.arange(ROWS * EXPERTS).view(ROWS, EXPERTS)

    assert torch.topk(scores_RE, TOP_K).indices.tolist() == [[7, 6]] * ROWS


def test_a_kernel_that_bypasses_the_router_is_refused() -> None:
    model = build("qwen3_moe")
    Routers(model)
    model.model.layers[1].mlp.forward = lambda hidden_states: hidden_states

    with pytest.raises(ConfigError, match=r"decoder layer 1 made no single topk .* E=8\] with K=2 .*'grouped_mm'"):
        forward(model)


def test_a_layer_that_is_skipped_is_refused() -> None:
    model = build("qwen3_moe")
    Routers(model)
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states

    with pytest.raises(ConfigError, match=r"decoder layers \[1\] did not"):
        forward(model)


def test_a_model_carries_one_routers_at_a_time() -> None:
    model = build("qwen3_moe")
    first = Routers(model)
    with pytest.raises(ConfigError, match="'model' is hooked already"):
        Routers(model)

    first.replay(foreign_routes(first), everywhere())
    first.remove()
    first.remove()
    second = Routers(model)
    plain = forward(model)

    assert second.live_RLK.shape == (ROWS, 3, TOP_K)
    second.remove()
    assert torch.equal(forward(model), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_autocast_replays_bit_exactly(family: str) -> None:
    model = build(family)
    routers = Routers(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model)
        routers.replay(routers.live_RLK, everywhere())
        assert_same_step(step(model), plain)

        routers.replay(foreign_routes(routers), everywhere())
        logits, gradients = step(model)

    assert not torch.allclose(logits, plain[0], atol=1e-2)
    assert all(gradient.abs().max() > 0 for gradient in router_gradients(routers, gradients).values())


@pytest.fixture
def single_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.usefixtures("single_process_group")
def test_fsdp2_sharded_layers_replay_like_unsharded_ones(family: str) -> None:
    plain_model = build(family)
    plain_routers = Routers(plain_model)
    ids_RLK = foreign_routes(plain_routers)
    plain_routers.replay(ids_RLK, everywhere())
    want_logits, want_gradients = step(plain_model)

    model = build(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    routers = Routers(model)
    routers.replay(ids_RLK, everywhere())
    logits, gradients = step(model)

    assert routers.layers == MOE_LAYERS[family]
    assert torch.equal(routers.live_RLK, plain_routers.live_RLK)
    full = {name: g.full_tensor() for name, g in gradients.items() if isinstance(g, DTensor)}
    assert_same_step((logits, full), (want_logits, want_gradients))
