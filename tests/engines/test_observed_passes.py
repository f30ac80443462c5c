"""Passes of verl's engine that are asked for more than log-probs: router features, coverage gaps, predicted routes.

Shapes: S sampled tokens of all sequences, T tokens of one, L MoE layers, E experts, K experts per token, H hidden size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import same_sets, write_random
from trainer import BATCH, LAYERS, LENGTHS, E, K, assert_same, foreign_routes, traces
from training_calls import Asked, Seen, make_config
from transformers import AutoModelForCausalLM

from moe_replay.errors import ConfigError, RoutingMismatch

H = 32
PACKED = make_config({"micro_batch_tokens": 24})
SAMPLED = [np.arange(number % 3, length, 1 + number % 4) for number, length in enumerate(LENGTHS)]
SAMPLED[4] = SAMPLED[4][:0]
EVERYTHING = [np.arange(length) for length in LENGTHS]


def drift(scale: float = 0.05) -> dict[int, np.ndarray]:
    """A predictor that changes some choices."""
    rng = np.random.default_rng(2)
    return {layer: (scale * rng.standard_normal((E, H))).astype("float32") for layer in LAYERS}


def gate_features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What hooks on the gates of transformers' own model see of the sampled tokens: [S, L, H] and [S, L, E]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
    parts = []
    for prompt, response, places in zip(BATCH.prompts, BATCH.responses, SAMPLED, strict=True):
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([prompt + response]))
        parts.append([torch.stack(part, 1)[places].numpy() for part in zip(*seen, strict=True)])
    hidden, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    return hidden, logits


def test_features_of_sampled_tokens_come_in_the_order_given_however_verl_packs_them(trainer, model):
    hidden_SLH, logits_SLE = gate_features(model)
    trainer.open_model(model, PACKED)

    for seen in (trainer.score(BATCH, None, Asked(sampled=SAMPLED)), trainer.step(BATCH, None, Asked(sampled=SAMPLED))):
        np.testing.assert_allclose(seen.hidden_SLH, hidden_SLH, rtol=0, atol=2e-5)
        np.testing.assert_allclose(seen.logits_SLE, logits_SLE, rtol=0, atol=2e-5)
        assert (seen.hidden_SLH.dtype, seen.logits_SLE.dtype) == (np.float32, np.float32)


def test_features_and_coverage_are_of_the_forward_and_not_of_its_recompute(trainer, model):
    found: list[Seen] = []
    for recompute in (False, True):
        trainer.open_model(model, make_config({"recompute": recompute, "micro_batch_tokens": 24}))
        found.append(trainer.step(BATCH, foreign_routes(), Asked(sampled=SAMPLED)))
    kept, recomputed = found
    assert_same(kept, recomputed)
    assert kept.hidden_SLH is not None
    np.testing.assert_array_equal(kept.hidden_SLH, recomputed.hidden_SLH)
    np.testing.assert_array_equal(kept.logits_SLE, recomputed.logits_SLE)
    np.testing.assert_array_equal(np.concatenate(kept.coverage_gap), np.concatenate(recomputed.coverage_gap))


def test_coverage_gap_is_that_of_the_reference_and_by_default_of_the_replayed_routes(trainer, model):
    trainer.open_model(model, PACKED)
    routes, live = foreign_routes(), trainer.score(BATCH, None).live
    other = traces(live, last_missing=True)
    by_default = trainer.score(BATCH, routes, Asked(sampled=EVERYTHING))
    compared = trainer.score(BATCH, routes, Asked(sampled=EVERYTHING, reference=other))
    logits_SLE = by_default.logits_SLE.astype("float64")
    shares_SLE = np.exp(logits_SLE) / np.exp(logits_SLE).sum(-1, keepdims=True)

    for seen, reference in ((by_default, routes), (compared, other)):
        ids_SLK = np.concatenate([trace.ids_TLK for trace in reference]).astype("int64")
        valid_S = np.concatenate([trace.valid_T for trace in reference])
        gap_SL = np.concatenate(seen.coverage_gap)
        want_SL = 1 - np.take_along_axis(shares_SLE, ids_SLK, -1).sum(-1)
        np.testing.assert_allclose(gap_SL[valid_S], want_SL[valid_S], rtol=0, atol=1e-6)
        assert np.isnan(gap_SL[~valid_S]).all()
        assert gap_SL.dtype == np.float32


def test_asking_changes_nothing_of_what_a_pass_returns(trainer, model):
    asked = Asked(reference=list(foreign_routes()), sampled=SAMPLED)
    for routes in (None, foreign_routes()):
        found = []
        for given in (Asked(), asked):
            trainer.open_model(model, PACKED)
            found.append((trainer.score(BATCH, routes, given), trainer.step(BATCH, routes, given), trainer.weights()))
        (scored, stepped, weights), (asked_scored, asked_stepped, asked_weights) = found
        assert_same(scored, asked_scored)
        assert_same(stepped, asked_stepped)
        assert (stepped.loss, stepped.grad_norm) == (asked_stepped.loss, asked_stepped.grad_norm)
        assert all((weights[name] == asked_weights[name]).all() for name in weights)
        assert scored.hidden_SLH is scored.logits_SLE is scored.routed is None
        assert np.isnan(np.concatenate(scored.coverage_gap)).all() == (routes is None)


def test_a_predicted_pass_routes_by_merged_gates_and_reports_the_live_choice(trainer, model):
    trainer.open_model(model, PACKED)
    plain, gates = trainer.score(BATCH, None), trainer.weights()
    seen = trainer.score(BATCH, None, Asked(sampled=EVERYTHING, predictor=drift()))

    routed, live = np.concatenate(seen.routed), np.concatenate(seen.live)
    for number, layer in enumerate(LAYERS):
        merged_EH = gates[f"model.layers.{layer}.mlp.gate.weight"] + drift()[layer]
        want = torch.from_numpy(seen.hidden_SLH[:, number] @ merged_EH.T).topk(K, dim=-1).indices.numpy()
        own = torch.from_numpy(seen.logits_SLE[:, number]).topk(K, dim=-1).indices.numpy()
        assert same_sets(routed[:, number], want).all()
        assert same_sets(live[:, number], own).all()
    changed = ~same_sets(routed, live)
    assert 0.02 < changed.mean() < 0.5
    assert same_sets(live[:, 0], np.concatenate(plain.live)[:, 0]).all()


def test_the_first_step_on_predicted_routes_starts_at_a_ratio_of_exactly_one(trainer, model):
    trainer.open_model(model, PACKED)
    predicted = trainer.score(BATCH, None, Asked(predictor=drift()))
    stepped = trainer.step(BATCH, traces(predicted.routed))
    for old, new in zip(predicted.log_probs, stepped.log_probs, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_zero_predictor_is_live_routing_to_the_last_bit(trainer, model):
    trainer.open_model(model, PACKED)
    plain = trainer.score(BATCH, None)
    zero = trainer.score(BATCH, None, Asked(predictor={layer: weight * 0 for layer, weight in drift().items()}))
    assert_same(plain, zero)
    for routed, live in zip(zero.routed, plain.live, strict=True):
        np.testing.assert_array_equal(routed, live)
    trainer.score(BATCH, None, Asked(predictor=drift()))
    assert_same(plain, trainer.score(BATCH, None))  # a predictor ends with its pass


def test_bf16_forwards_give_float32_features(trainer, model):
    trainer.open_model(model, make_config({"dtype": "bfloat16"}))
    seen = trainer.score(BATCH, foreign_routes(), Asked(sampled=SAMPLED))
    exact, _ = gate_features(model)
    assert seen.hidden_SLH.dtype == seen.logits_SLE.dtype == np.float32
    np.testing.assert_allclose(seen.hidden_SLH[:, 0], exact[:, 0], rtol=0.1, atol=0.1)
    assert np.isfinite(np.concatenate(seen.coverage_gap)).all()


def test_a_model_that_chooses_by_more_than_logits_can_be_compared_but_not_sampled_or_predicted(trainer, tmp_path):
    trainer.open_model(write_random(tmp_path, "deepseek_v3"), PACKED)
    routes = foreign_routes(layers=(1, 2))
    assert np.isfinite(np.concatenate(trainer.score(BATCH, routes).coverage_gap)).all()
    for asked in (Asked(sampled=EVERYTHING), Asked(predictor={1: drift()[1]})):
        with pytest.raises(ConfigError, match=r"decoder layer 1 chose others in \d+ of \d+ rows"):
            trainer.score(BATCH, None, asked)
    trainer.score(BATCH, routes)


@pytest.mark.parametrize(
    ("routes", "asked", "error", "message"),
    [
        (
            None,
            Asked(sampled=[places + 1 for places in EVERYTHING]),
            RoutingMismatch,
            r"ascend within 0\.\.1, .* \[1, 2",
        ),
        (None, Asked(sampled=[places[::-1] for places in EVERYTHING]), RoutingMismatch, "positions ascend"),
        (None, Asked(reference=foreign_routes(experts=16)), RoutingMismatch, r"\(16, 2, "),
        (None, Asked(predictor={7: np.ones((E, H), "float32")}), RoutingMismatch, "fitted for another model"),
        (foreign_routes(), Asked(predictor=drift()), ConfigError, "replays routes or predicts them"),
    ],
    ids=["outside", "descending", "reference", "predictor", "both"],
)
def test_what_does_not_belong_to_the_tokens_or_the_model_is_refused(trainer, model, routes, asked, error, message):
    trainer.open_model(model, PACKED)
    with pytest.raises(error, match=message):
        trainer.score(BATCH, routes, asked)


def test_a_sample_may_leave_out_sequences_and_even_all(trainer, model):
    trainer.open_model(model, PACKED)
    nothing = trainer.score(BATCH, None, Asked(sampled=[places[:0] for places in EVERYTHING]))
    assert nothing.hidden_SLH.shape == (0, len(LAYERS), H)
    one = trainer.score(
        BATCH, None, Asked(sampled=[places[: 3 * (number == 2)] for number, places in enumerate(EVERYTHING)])
    )
    whole = trainer.score(BATCH, None, Asked(sampled=EVERYTHING))
    start = sum(LENGTHS[:2])
    np.testing.assert_array_equal(one.hidden_SLH, whole.hidden_SLH[start : start + 3])


def test_the_engine_tells_how_wide_its_routers_are(trainer, model):
    trainer.open_model(model, PACKED)
    assert trainer.hidden_size() == H
