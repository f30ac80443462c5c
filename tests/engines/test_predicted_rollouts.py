"""Predictors merged into vLLM's routers, and routers in float32, in which small ones survive."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import assert_same, same_sets
from predictors import (
    HIDDEN_SIZE,
    LAYERS,
    NUM_EXPERTS,
    gate_name,
    weights_of,
    write_merged,
    write_predictor,
    write_weights,
)
from rollouts import TOLERANCE, Predictor, assert_as_transformers, generate, held, load

from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.errors import ConfigError, RoutingMismatch

LARGE = 0.1  # of a predictor; the embedded model's routers are of the same size


# Predictors


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    """For three of four layers."""
    return write_predictor(tmp_path_factory.mktemp("predictors") / "predictor.safetensors", LARGE)


def test_predicted_routes_and_log_probs_are_those_of_gates_merged_on_disk(
    embedded, assets, perturbed, predictor, questions, tmp_path
):
    """Whether only the routers are loaded, or a predictor with other weights."""
    unpredicted = generate(embedded, questions)
    merged = write_merged(assets.model, predictor[0], tmp_path / "merged")
    load(embedded, merged, "merged")
    expected = generate(embedded, questions)
    assert_as_transformers(expected, merged)
    load(embedded, assets.model, "embedded")
    load(embedded, assets.model, "embedded", predictor)
    assert_same(generate(embedded, questions), expected)
    load(embedded, perturbed, "perturbed")
    load(embedded, assets.model, "embedded", predictor)
    assert_same(generate(embedded, questions), expected)
    pairs = zip(unpredicted, expected, strict=True)
    assert not any(same_sets(a.trace.ids_TLK[:8], b.trace.ids_TLK[:8]).all() for a, b in pairs)


def test_a_predictor_is_gone_once_the_same_weights_are_loaded_without(embedded, assets, predictor, questions):
    before, of = generate(embedded, questions), held(embedded)
    load(embedded, assets.model, "embedded", predictor)
    weights, sha256, gates_sha256, fidelity = held(embedded)
    assert (weights, sha256, gates_sha256) == ("embedded", predictor[1], of[2])
    assert fidelity == pytest.approx(1, abs=1e-6)
    load(embedded, assets.model, "embedded")
    assert held(embedded) == of == ("embedded", None, of[2], None)
    assert_same(generate(embedded, questions), before)


@pytest.mark.parametrize("used", [(), LAYERS], ids=["empty", "zero"])
def test_a_predictor_of_nothing_changes_nothing(embedded, assets, questions, tmp_path, used):
    before = generate(embedded, questions)
    load(embedded, assets.model, "embedded", write_predictor(tmp_path / "p.safetensors", 0.0, used))
    assert held(embedded)[3] is None
    assert_same(generate(embedded, questions), before)


def test_another_predictor_for_weights_that_are_there_reads_only_routers(
    embedded, assets, predictor, questions, tmp_path
):
    load(embedded, assets.model, "embedded", predictor)
    expected = generate(embedded, questions)
    load(embedded, assets.model, "embedded")
    routers = {name: tensor for name, tensor in weights_of(assets.model).items() if ".gate." in name}
    load(embedded, write_weights(assets.model, routers, tmp_path / "routers"), "embedded", predictor)
    assert_same(generate(embedded, questions), expected)
    routers.pop(gate_name(1))
    with pytest.raises(RoutingMismatch, match=r"decoder layers \[1\] did not get all"):
        load(embedded, write_weights(assets.model, routers, tmp_path / "fewer"), "embedded")
    load(embedded, assets.model, "embedded", predictor)
    assert_same(generate(embedded, questions), expected)


def test_weights_and_predictor_held_already_are_not_loaded_again(embedded, assets, predictor, questions, tmp_path):
    load(embedded, assets.model, "embedded", predictor)
    before = generate(embedded, questions)
    load(embedded, tmp_path / "nowhere", "embedded", (tmp_path / "nowhere", predictor[1]))
    assert_same(generate(embedded, questions), before)


@pytest.mark.parametrize(
    "foreign",
    [
        {"layers": (*LAYERS, 4)},
        {"shape": (2 * NUM_EXPERTS, HIDDEN_SIZE)},
        {"shape": (NUM_EXPERTS, HIDDEN_SIZE // 2)},
    ],
    ids=str,
)
def test_a_predictor_of_another_model_is_refused_and_the_engine_serves_on(
    embedded, assets, predictor, questions, tmp_path, foreign
):
    load(embedded, assets.model, "embedded", predictor)
    before, of = generate(embedded, questions), held(embedded)
    for weights in ("embedded", "other"):
        with pytest.raises(RoutingMismatch, match="is of a model with"):
            load(embedded, assets.model, weights, write_predictor(tmp_path / "p.safetensors", LARGE, **foreign))
    assert held(embedded) == of
    assert_same(generate(embedded, questions), before)


# Routers in float32


def in_bfloat16(engine: EngineProcess, assets, function: str, *args: Any) -> Any:
    """On an engine in bfloat16 whose routers are in float32; it starts from the embedded model."""
    return engine.call("rollout_calls:in_bfloat16", no_progress, assets.model, function, *args)


def test_routers_in_float32_multiply_in_float32_from_the_first_load_on(embedded, assets, perturbed, questions):
    hidden_TH = np.random.default_rng(0).normal(size=(50, HIDDEN_SIZE)).astype(np.float32)
    rounded_TH = torch.from_numpy(hidden_TH).bfloat16().double()

    def assert_logits(folder: Path) -> None:
        dtype, logits_TE = in_bfloat16(embedded, assets, "route", 2, hidden_TH)
        assert dtype == "torch.float32"
        expected_TE = rounded_TH @ weights_of(folder)[gate_name(2)].double().T
        np.testing.assert_allclose(logits_TE, expected_TE.numpy(), rtol=0, atol=TOLERANCE)

    assert_logits(assets.model)
    fresh = in_bfloat16(embedded, assets, "generate", questions, 1.0)
    for folder in (perturbed, assets.model):
        in_bfloat16(embedded, assets, "load", folder, folder.name)
        assert_logits(folder)
    assert_same(in_bfloat16(embedded, assets, "generate", questions, 1.0), fresh)


def test_small_predictors_survive_in_routers_in_float32(embedded, assets, questions, tmp_path):
    in_bfloat16(embedded, assets, "load", assets.model, "embedded")
    path, sha256 = write_predictor(tmp_path / "p.safetensors", LARGE / 1000)
    in_bfloat16(embedded, assets, "load", assets.model, "embedded", (path, sha256))
    predicted = in_bfloat16(embedded, assets, "generate", questions, 1.0)
    assert in_bfloat16(embedded, assets, "held")[3] == pytest.approx(1, abs=1e-3)
    in_bfloat16(embedded, assets, "load", write_merged(assets.model, path, tmp_path / "merged"), "merged")
    assert_same(in_bfloat16(embedded, assets, "generate", questions, 1.0), predicted)


def test_routers_that_cannot_be_held_in_float32_are_refused(embedded):
    with pytest.raises(ConfigError, match=r'router of decoder layer 2 is a Other .* rollout.gate_dtype = "engine"'):
        embedded.call("rollout_calls:widen_another", no_progress)
