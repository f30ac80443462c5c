"""LoRA in verl's engine under replayed routes, with routers that are frozen and routers that are trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from models import reference, write_random
from safetensors.numpy import load_file
from trainer import BATCH, LAYERS, LENGTHS, E, K, assert_same, foreign_routes, largest_difference, traces
from training_calls import Asked, Seen, make_config

from moe_replay.config import RunConfig
from moe_replay.errors import ConfigError

RANK, ALPHA = 4, 8
both = pytest.mark.parametrize("train_routers", [False, True], ids=["frozen routers", "trained routers"])


def config_of(train_routers: bool = False, training: dict | None = None, **lora) -> RunConfig:
    settings = {"rank": RANK, "alpha": ALPHA, "train_routers": train_routers, **lora}
    return make_config({"lora": settings, **(training or {})})


def step(trainer, times: int = 1) -> Seen:
    for _ in range(times - 1):
        trainer.step(BATCH, foreign_routes())
    return trainer.step(BATCH, foreign_routes())


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def changed(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if (one[name] != other[name]).any()}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert changed(one, other) == set()


# Passes


@both
def test_a_fresh_adapter_changes_nothing(trainer, model, train_routers):
    trainer.open_model(model, make_config())
    plain = trainer.score(BATCH, None), trainer.score(BATCH, foreign_routes())
    assert trainer.open_model(model, config_of(train_routers)) == (E, K, LAYERS)
    assert_same(plain[0], trainer.score(BATCH, None))
    assert_same(plain[1], trainer.score(BATCH, foreign_routes()))


@both
def test_the_experts_that_serve_are_those_replayed(trainer, model, train_routers):
    routes = foreign_routes()
    trainer.open_model(model, config_of(train_routers))
    before = trainer.score(BATCH, routes)
    for trainer_pass in (trainer.step, trainer.score):
        seen = trainer_pass(BATCH, routes)
        for number, (served, live) in enumerate(zip(trainer.served(BATCH), seen.live, strict=True)):
            np.testing.assert_array_equal(served, routes[number].ids_TLK)
            assert served.shape == live.shape
    assert largest_difference(before.log_probs, seen.log_probs) > 1e-3

    live = trainer.score(BATCH, None)
    assert_same(live, trainer.score(BATCH, traces(live.live)))


@both
def test_a_step_trains_adapters_and_routers_only_where_they_are_trained(trainer, model, train_routers):
    trainer.open_model(model, config_of(train_routers))
    before = trainer.weights()
    seen = step(trainer, 2)  # the first moves one factor of each adapter, whose other factor is zero
    after = trainer.weights()
    moved = changed(before, after)
    assert seen.grad_norm > 0
    assert {name for name in moved if is_adapter(name)} == {name for name in before if is_adapter(name)}
    assert {name for name in moved if not is_adapter(name)} == (
        set(filter(is_router, before)) if train_routers else set()
    )
    # Attention, and two tensors of each layer's experts.
    assert len([name for name in before if ".lora_A." in name]) == len(LAYERS) * 6
    untouched = load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(after[f"base_model.model.{name}.base_layer.weight"], untouched[f"{name}.weight"])


@both
def test_recompute_gives_the_same_step(trainer, model, train_routers):
    found = []
    for recompute in (False, True):
        trainer.open_model(model, config_of(train_routers, {"recompute": recompute, "micro_batch_tokens": 24}))
        found.append((step(trainer, 2), trainer.weights()))
    assert_same(found[0][0], found[1][0])
    assert_equal(found[0][1], found[1][1])


def test_router_features_and_predictions_are_those_of_the_merged_model(trainer, model, tmp_path):
    trainer.open_model(model, config_of(train_routers=True))
    step(trainer, 3)
    trainer.save(tmp_path)
    predictor = {layer: np.random.default_rng(2).normal(0, 0.3, (E, 32)).astype("float32") for layer in LAYERS}
    observed = Asked(reference=foreign_routes(), sampled=[np.arange(length)[::2] for length in LENGTHS])
    predicted = Asked(reference=foreign_routes(), predictor=predictor)
    adapted = trainer.score(BATCH, foreign_routes(), observed), trainer.score(BATCH, None, predicted)
    trainer.open_model(tmp_path / "huggingface", make_config())
    merged = trainer.score(BATCH, foreign_routes(), observed), trainer.score(BATCH, None, predicted)

    np.testing.assert_allclose(adapted[0].hidden_SLH, merged[0].hidden_SLH, rtol=0, atol=1e-4)
    np.testing.assert_allclose(adapted[0].logits_SLE, merged[0].logits_SLE, rtol=0, atol=1e-4)
    for one, other in zip(adapted, merged, strict=True):
        assert_same(one, other, tolerance=1e-4)
        for a, b in zip(one.coverage_gap, other.coverage_gap, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    for a, b, live in zip(adapted[1].routed, merged[1].routed, adapted[1].live, strict=True):
        np.testing.assert_array_equal(np.sort(a), np.sort(b))
        assert (np.sort(a) != np.sort(live)).any() or len(a) < 3


# Checkpoints


@pytest.fixture(params=[False, True], ids=["frozen routers", "trained routers"])
def saved(request, trainer, model, tmp_path) -> tuple[RunConfig, Path]:
    """A checkpoint in the warm-up, after three steps."""
    config = config_of(request.param, {"warmup_steps": 4, "adam_betas": (0.8, 0.95), "weight_decay": 0.1})
    trainer.open_model(model, config)
    step(trainer, 3)
    trainer.save(tmp_path / "checkpoint")
    return config, tmp_path / "checkpoint"


def test_steps_after_a_reload_equal_those_without_to_the_last_bit(trainer, model, saved, tmp_path):
    config, folder = saved
    before = trainer.weights()
    seen, expected = step(trainer, 2), trainer.weights()
    trainer.save(tmp_path / "uninterrupted")

    trainer.open_model(model, config)
    for number in range(2):  # nothing wears off by saving and loading
        trainer.load(folder, f"saved {number}", True)
        assert_equal(before, trainer.weights())
        folder = tmp_path / f"again {number}"
        trainer.save(folder)
    again = step(trainer, 2)
    trainer.save(tmp_path / "resumed")

    assert_same(seen, again)
    assert (again.loss, again.grad_norm) == (seen.loss, seen.grad_norm)
    assert_equal(expected, trainer.weights())
    for file in sorted(path for path in (tmp_path / "uninterrupted").rglob("*") if path.is_file()):
        name = file.relative_to(tmp_path / "uninterrupted")
        assert (tmp_path / "resumed" / name).read_bytes() == file.read_bytes(), name


def test_the_merged_model_is_one_of_transformers_with_the_engines_log_probs(trainer, model, saved, tmp_path):
    _, folder = saved
    held, seen = trainer.weights(), trainer.score(BATCH, None)
    for number, pair in enumerate(zip(BATCH.prompts, BATCH.responses, strict=True)):
        expected = reference(folder / "huggingface", *pair, 1.0)
        np.testing.assert_allclose(seen.log_probs[number], expected.log_probs_S, rtol=0, atol=1e-4)

    # Everything but the weights is as a checkpoint of all weights has it.
    trainer.open_model(model, make_config())
    trainer.save(tmp_path / "plain")
    plain = {path.name: path.read_bytes() for path in (tmp_path / "plain" / "huggingface").iterdir()}
    merged = {path.name: path.read_bytes() for path in (folder / "huggingface").iterdir()}
    assert plain.keys() == merged.keys()
    assert {name for name in plain if plain[name] != merged[name]} == {"model.safetensors"}
    initial, weights = load_file(model / "model.safetensors"), load_file(folder / "huggingface" / "model.safetensors")
    trains_routers = any(is_router(name) for name in load_file(folder / "adapters" / "adapters.safetensors"))
    projections = ("_proj.weight", "mlp.gate.weight") if trains_routers else ("_proj.weight",)
    assert changed(initial, weights) == {name for name in initial if name.endswith(projections)}
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    product = held[f"{name}.lora_B.default.weight"] @ held[f"{name}.lora_A.default.weight"] * (ALPHA / RANK)
    expected = held[f"{name}.base_layer.weight"] + product
    np.testing.assert_allclose(weights["model.layers.1.self_attn.q_proj.weight"], expected, rtol=0, atol=1e-6)


def test_a_checkpoint_holds_no_pickle_and_only_what_was_trained(saved):
    config, folder = saved
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".txt"}
    trained = load_file(folder / "adapters" / "adapters.safetensors")
    routers = {name for name in trained if not is_adapter(name)}
    assert all(map(is_router, routers))
    assert len(routers) == (len(LAYERS) if config.training.lora.train_routers else 0)
    slots = load_file(folder / "optimizer" / "optimizer.safetensors")
    assert {key.rsplit("/", 1)[0] for key in slots} == trained.keys()
    settings = json.loads((folder / "adapters" / "adapters.json").read_text())
    assert (settings["rank"], settings["alpha"]) == (RANK, ALPHA)


@pytest.mark.parametrize(
    ("other", "numbers"),
    [
        (make_config(), "adapters of 36 tensors .rank 4, alpha 8. and this run trains with no adapters"),
        (config_of(alpha=16), r"\(rank 4, alpha 8\).*\(rank 4, alpha 16\)"),
        (config_of(train_routers=True), "of 36 tensors.* of 39 tensors"),
    ],
    ids=["none", "alpha", "routers"],
)
def test_adapters_of_other_settings_are_refused(trainer, model, tmp_path, other, numbers):
    trainer.open_model(model, config_of())
    trainer.save(tmp_path)
    trainer.open_model(model, other)
    with pytest.raises(ConfigError, match=numbers):
        trainer.load(tmp_path, "saved", True)


def test_a_checkpoint_of_all_weights_is_refused_where_adapters_are_trained(trainer, model, tmp_path):
    trainer.open_model(model, make_config())
    trainer.save(tmp_path)
    trainer.open_model(model, config_of())
    with pytest.raises(ConfigError, match=r"no adapters and this run trains with adapters.*model\.path"):
        trainer.load(tmp_path, "saved", True)


# Models


def test_a_model_with_shared_experts_and_a_dense_layer_first_trains_and_goes_on(trainer, tmp_path):
    model = write_random(tmp_path / "model", "deepseek_v3")
    config = config_of(train_routers=True)
    routes = foreign_routes(layers=(1, 2))
    assert trainer.open_model(model, config) == (E, K, (1, 2))
    trainer.step(BATCH, routes)
    trainer.save(tmp_path / "checkpoint")
    seen = trainer.step(BATCH, routes)
    trainer.load(tmp_path / "checkpoint", "saved", True)
    again = trainer.step(BATCH, routes)
    assert_same(seen, again)
    assert again.grad_norm == seen.grad_norm
    trained = load_file(tmp_path / "checkpoint" / "adapters" / "adapters.safetensors")
    for part in ("mlp.gate.weight", "layers.0.mlp.up_proj", "layers.1.mlp.shared_experts.up_proj", "mlp.experts"):
        assert any(part in name for name in trained), part


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("query",)}, r"no weight of the model's decoder layers ends in 'query'; there are experts\."),
        ({"targets": ("lm_head",)}, "ends in 'lm_head'"),
        ({"rank": 17}, r"rank = 17 is above the smaller dimension of model\.layers\.0\.self_attn\.k_proj, 16"),
    ],
    ids=["unknown", "outside", "rank"],
)
def test_adapters_that_the_model_has_no_place_for_are_refused(trainer, model, lora, message):
    with pytest.raises(ConfigError, match=message):
        trainer.open_model(model, config_of(**lora))
