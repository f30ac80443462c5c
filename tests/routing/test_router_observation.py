"""What a forward keeps of its routers: inputs and logits of watched rows, coverage gaps of compared routes.

Shapes: R rows, S rows watched, L MoE layers, E experts, K experts per token, H hidden size.
"""

from typing import Any

import pytest
import torch
from families import CORE, EXPERTS, MOE_LAYERS, ROWS, TOP_K, build, build_plain
from hypothesis import given, settings
from hypothesis import strategies as st
from model_steps import (
    assert_same_step,
    everywhere,
    foreign_routes,
    forward,
    router_weights,
    same_sets,
    step,
)
from torch import Tensor, nn

from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.observation import strays
from moe_replay.routing.routers import Routers

SOME_ROWS = torch.tensor([1, 4, 5, 20])
OBSERVED = ["qwen3_moe", "deepseek_v3", "gpt_oss"]


def hooked_gates(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs [R, L, H] and logits [R, L, E] of Qwen3-MoE's gates in a plain forward."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_gate: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        seen.append((args[0].reshape(-1, args[0].shape[-1]), output[0]))

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]  # type: ignore[union-attr]
    with torch.no_grad():
        forward(model)
    for handle in handles:
        handle.remove()
    return torch.stack([hidden for hidden, _ in seen], 1), torch.stack([logits for _, logits in seen], 1)


def test_watched_rows_are_those_of_a_plain_forward_to_the_last_bit() -> None:
    model = build("qwen3_moe")
    hidden_RLH, logits_RLE = hooked_gates(model)
    routers = Routers(model)

    routers.watch(SOME_ROWS)
    forward(model)

    assert torch.equal(routers.features.hidden_SLH, hidden_RLH[SOME_ROWS])
    assert torch.equal(routers.features.logits_SLE, logits_RLE[SOME_ROWS])


@pytest.mark.parametrize("family", MOE_LAYERS)
def test_features_are_found_in_every_family(family: str) -> None:
    model = build_plain(family)
    routers = Routers(model)
    plain = forward(model)
    routers.watch(torch.arange(ROWS))

    assert torch.equal(forward(model), plain)

    features, weights = routers.features, router_weights(model, routers)
    chosen_RLK = features.logits_SLE.topk(TOP_K, dim=-1).indices
    assert same_sets(chosen_RLK, routers.live_RLK).all()
    for number, layer in enumerate(routers.layers):
        logits_RE = features.hidden_SLH[:, number] @ weights[layer].T
        bias_RE = features.logits_SLE[:, number] - logits_RE
        torch.testing.assert_close(bias_RE, bias_RE[:1].expand(ROWS, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", OBSERVED)
@pytest.mark.parametrize("replays", [False, True])
def test_observing_changes_no_step_and_recompute_is_not_observed(family: str, replays: bool) -> None:
    model = build_plain(family)
    routers = Routers(model)
    if replays:
        routers.replay(foreign_routes(routers), everywhere())
    want = step(model)
    routers.watch(SOME_ROWS)
    routers.compare(foreign_routes(routers, seed=8), everywhere())
    assert_same_step(step(model), want)
    features, gap_RL = routers.features, routers.coverage_gap_RL

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    assert_same_step(step(model), want)
    assert torch.equal(routers.features.hidden_SLH, features.hidden_SLH)
    assert torch.equal(routers.features.logits_SLE, features.logits_SLE)
    assert torch.equal(routers.coverage_gap_RL, gap_RL)


@pytest.mark.parametrize("family", CORE)  # some of which choose by more than their logits
def test_coverage_gap_is_what_the_compared_experts_leave_of_the_softmax(family: str) -> None:
    model = build(family)
    routers = Routers(model)
    reference_RLK, present_R = foreign_routes(routers, seed=8), torch.arange(ROWS) % 3 > 0
    routers.replay(foreign_routes(routers), everywhere())
    routers.compare(reference_RLK, present_R)
    seen: list[Tensor] = []
    linear = torch.nn.functional.linear

    def spy(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear(hidden, weight, bias)
        if weight.shape == (EXPERTS, routers.hidden_size):
            seen.append(logits.detach().reshape(ROWS, EXPERTS).double())
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        forward(model)

    covered_RL = torch.stack(seen, 1).softmax(-1).gather(-1, reference_RLK).sum(-1)
    gap_RL = routers.coverage_gap_RL
    torch.testing.assert_close(gap_RL[present_R].double(), 1 - covered_RL[present_R], rtol=0, atol=1e-6)
    assert gap_RL[~present_R].isnan().all()
    assert gap_RL.dtype == torch.float32


def test_replayed_routes_are_compared_by_default() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.replay(foreign_routes(routers), everywhere())
    gaps = []
    for reference in ((foreign_routes(routers), everywhere()), ()):
        routers.compare(*reference)
        forward(model)
        gaps.append(routers.coverage_gap_RL)

    assert torch.equal(*gaps)


def test_experts_chosen_leave_less_than_others() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    forward(model)
    live_RLK, gaps = routers.live_RLK, []
    for ids_RLK in (live_RLK, foreign_routes(routers)):
        routers.compare(ids_RLK, everywhere())
        forward(model)
        gaps.append(routers.coverage_gap_RL)

    assert (gaps[0] <= gaps[1] + 1e-6).all()
    assert ((gaps[0] >= 0) & (gaps[1] <= 1)).all()


def set_bias(model: Any, by: float) -> None:
    model.model.layers[2].mlp.gate.e_score_correction_bias[3] = by


@pytest.mark.parametrize("asked", ["watch", "predict"])
@pytest.mark.parametrize("why", ["bias", "groups"])
def test_routers_that_choose_by_more_than_logits_are_refused_when_asked_and_only_then(asked: str, why: str) -> None:
    if why == "groups":
        model, number = build("deepseek_v3"), 1  # one of two groups of experts is closed to a token
    else:
        model, number = build_plain("deepseek_v3"), 2
        set_bias(model, 10.0)
    routers = Routers(model)
    plain = forward(model)
    routers.compare(routers.live_RLK, everywhere())
    assert torch.equal(forward(model), plain)
    shape = (routers.num_experts, routers.hidden_size)

    if asked == "watch":
        routers.watch(SOME_ROWS)
    else:
        routers.predict({layer: torch.full(shape, 1e-3) for layer in routers.layers}, everywhere())

    rows = 4 if asked == "watch" else 24
    with pytest.raises(ConfigError, match=rf"decoder layer {number} chose others in \d+ of {rows} rows .* \(r3\)"):
        forward(model)


def test_a_router_without_a_linear_map_has_neither_features_nor_coverage() -> None:
    model = build("qwen3_moe")
    gate = model.model.layers[1].mlp.gate

    def by_matmul(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states.reshape(-1, gate.hidden_dim) @ gate.weight.T
        values, indices = torch.topk(logits.softmax(-1), gate.top_k, dim=-1)
        return logits, values / values.sum(-1, keepdim=True), indices

    gate.forward = by_matmul
    routers = Routers(model)
    forward(model)
    routers.compare(routers.live_RLK, everywhere())
    forward(model)
    assert routers.coverage_gap_RL.isnan().all(0).tolist() == [False, True, False]

    refusal = r"that of decoder layer 1 calls no torch\.nn\.functional\.linear"
    routers.watch(SOME_ROWS)
    with pytest.raises(ConfigError, match=refusal):
        forward(model)
    routers.forget()
    routers.predict({1: torch.ones(routers.num_experts, routers.hidden_size)}, everywhere())
    with pytest.raises(ConfigError, match=refusal):
        forward(model)


def test_nothing_is_kept_unless_asked_and_once_forgotten() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    with pytest.raises(RoutingMismatch, match="no routes are replayed that could be compared"):
        routers.compare()
    routers.watch(SOME_ROWS)
    routers.compare(foreign_routes(routers), everywhere())
    forward(model)
    assert routers.features.hidden_SLH.shape == (4, 3, routers.hidden_size)

    routers.forget()
    forward(model)

    with pytest.raises(RoutingMismatch, match="told to watch rows"):
        _ = routers.features
    with pytest.raises(RoutingMismatch, match="that was compared"):
        _ = routers.coverage_gap_RL


def test_rows_that_a_forward_does_not_have_are_refused() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    routers.watch(torch.tensor([0, ROWS]))
    with pytest.raises(RoutingMismatch, match="row 24 is watched but 24 rows reach the router of decoder layer 0"):
        forward(model)

    routers.watch(torch.tensor([], dtype=torch.int64))
    forward(model)
    assert routers.features.logits_SLE.shape == (0, 3, EXPERTS)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_features_of_bf16_routers_are_float32_and_their_rounding_is_no_stray(family: str) -> None:
    model = build_plain(family)
    routers = Routers(model)
    routers.watch(torch.arange(ROWS))
    routers.compare(foreign_routes(routers), everywhere())

    with torch.autocast("cpu", torch.bfloat16):
        forward(model)

    features = routers.features
    assert {features.hidden_SLH.dtype, features.logits_SLE.dtype} == {torch.float32}
    assert routers.coverage_gap_RL.dtype == torch.float32
    assert torch.equal(features.logits_SLE, features.logits_SLE.bfloat16().float())


SCORES = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1), "logits": lambda logits: logits}


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(list(SCORES)),
    st.sampled_from([0.0, 0.01, 1.0, 30.0]),
)
def test_a_choice_by_logits_never_strays_however_its_scores_round(seed: int, dtype: Any, by: str, scale: float) -> None:
    logits_RE = (scale * torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))).to(dtype)
    scores_RE = SCORES[by](logits_RE)

    assert not strays(logits_RE, scores_RE, scores_RE.topk(4, dim=-1).indices).any()


def test_a_choice_by_logits_and_bias_strays_where_the_bias_changes_it() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_RE, bias_E = torch.randn(256, 16, generator=generator), torch.randn(16, generator=generator)
    scores_RE = logits_RE.sigmoid() + 0.1 * bias_E
    ids_RK = scores_RE.topk(4, dim=-1).indices

    differs_R = ~same_sets(ids_RK, logits_RE.topk(4, dim=-1).indices)

    assert differs_R.any()
    assert torch.equal(strays(logits_RE, scores_RE, ids_RK), differs_R)
