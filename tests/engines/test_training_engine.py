"""verl's engine under replayed routes, on a tiny random model in float32."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from models import reference, same_sets, write_random
from safetensors.numpy import load_file
from trainer import BATCH, LAYERS, LENGTHS, E, K, assert_same, foreign_routes, largest_difference, traces
from training_calls import Asked, Seen, make_config, random_batch

from moe_replay.config import RunConfig
from moe_replay.errors import ConfigError, OutOfMemory, RoutingMismatch
from moe_replay.methods import PRESETS, PolicyLoss

# What a pass returns


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_live_routes_are_those_of_transformers(trainer, model, temperature):
    config = make_config(rollout={"temperature": temperature})
    assert trainer.open_model(model, config) == (E, K, LAYERS)
    seen = trainer.score(BATCH, None)
    expected = [reference(model, *pair, temperature) for pair in zip(BATCH.prompts, BATCH.responses, strict=True)]
    for number, one in enumerate(expected):
        np.testing.assert_allclose(seen.log_probs[number], one.log_probs_S, rtol=0, atol=2e-5)
        assert same_sets(seen.live[number], one.ids_TLK)[one.router_margin_TL > 1e-5].all()


def test_results_come_in_the_order_given_however_verl_packs_them(trainer, model):
    routes = foreign_routes()
    for given in (None, routes):
        trainer.open_model(model, make_config())
        whole = trainer.score(BATCH, given), trainer.step(BATCH, given)
        trainer.open_model(model, make_config({"micro_batch_tokens": 24}))
        packed = trainer.score(BATCH, given), trainer.step(BATCH, given)
        assert_same(whole[0], packed[0], tolerance=2e-5)
        assert_same(whole[1], packed[1], tolerance=2e-5)
        assert packed[1].loss == pytest.approx(whole[1].loss, rel=1e-4)
        assert packed[1].grad_norm == pytest.approx(whole[1].grad_norm, rel=1e-4)


def test_a_batch_in_another_order_gives_the_same_in_that_order(trainer, model):
    trainer.open_model(model, make_config({"micro_batch_tokens": 24}))
    routes = foreign_routes()
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    turned = replace(BATCH, prompts=[BATCH.prompts[i] for i in order], responses=[BATCH.responses[i] for i in order])
    straight, other = trainer.score(BATCH, routes), trainer.score(turned, [routes[i] for i in order])
    expected = Seen(
        [straight.log_probs[i] for i in order],
        [straight.entropy[i] for i in order],
        [straight.live[i] for i in order],
        0.0,
        0.0,
    )
    assert_same(expected, other, tolerance=2e-5)


# Replay


def test_replaying_its_own_routes_reproduces_log_probs_exactly(trainer, model):
    trainer.open_model(model, make_config({"micro_batch_tokens": 24}))
    live = trainer.score(BATCH, None)
    replayed = trainer.score(BATCH, traces(live.live))
    assert_same(live, replayed)


def test_foreign_routes_change_log_probs_and_live_routes_stay_the_routers_own_choice(trainer, model):
    trainer.open_model(model, make_config())
    live, foreign = trainer.score(BATCH, None), trainer.score(BATCH, foreign_routes())
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(live.log_probs, foreign.log_probs, strict=True))
    # The first layer's router sees the same hidden states whatever is replayed.
    for own, under_replay in zip(live.live, foreign.live, strict=True):
        assert same_sets(own[:, :1], under_replay[:, :1]).all()


def test_rows_without_a_route_are_routed_live(trainer, model):
    trainer.open_model(model, make_config())
    live = trainer.score(BATCH, None)
    missing = [replace(trace, ids_TLK=trace.ids_TLK * 0, valid_T=trace.valid_T & False) for trace in foreign_routes()]
    assert_same(live, trainer.score(BATCH, missing))
    # The last token feeds no log-prob, but its live route is its router's own.
    cut = trainer.score(BATCH, traces(live.live, last_missing=True))
    assert_same(live, cut)


def test_some_rows_of_a_sequence_can_be_missing(trainer, model):
    trainer.open_model(model, make_config())
    live, foreign = trainer.score(BATCH, None), foreign_routes()
    half = [trace.valid_T & (np.arange(trace.num_tokens) % 2 == 0) for trace in foreign]
    holes = [replace(t, ids_TLK=t.ids_TLK * v[:, None, None], valid_T=v) for t, v in zip(foreign, half, strict=True)]
    partly = trainer.score(BATCH, holes)
    filled = [np.where(v[:, None, None], t.ids_TLK, own) for t, v, own in zip(foreign, half, partly.live, strict=True)]
    assert_same(partly, trainer.score(BATCH, traces(filled)))
    assert largest_difference(partly.log_probs, live.log_probs) > 1e-3
    assert largest_difference(partly.log_probs, trainer.score(BATCH, foreign).log_probs) > 1e-3


@pytest.mark.parametrize(
    ("routes", "numbers"),
    [
        (foreign_routes(experts=16), r"\(16, 2, \(0, 1, 2\)\), expected \(8, 2, \(0, 1, 2\)\)"),
        (foreign_routes(top_k=3), r"\(8, 3, \(0, 1, 2\)\), expected \(8, 2, \(0, 1, 2\)\)"),
        (foreign_routes(layers=(1, 2, 3)), r"\(8, 2, \(1, 2, 3\)\), expected \(8, 2, \(0, 1, 2\)\)"),
        (foreign_routes(layers=(0, 1)), r"\(8, 2, \(0, 1\)\), expected \(8, 2, \(0, 1, 2\)\)"),
        (foreign_routes([n + (i == 4) for i, n in enumerate(LENGTHS)]), "cover .* rows but sequence 4 has"),
    ],
    ids=["experts", "top-k", "layer map", "layers", "tokens"],
)
def test_routes_of_another_model_or_of_other_tokens_are_refused(trainer, model, routes, numbers):
    trainer.open_model(model, make_config())
    before = trainer.weights()
    with pytest.raises(RoutingMismatch, match=numbers):
        trainer.score(BATCH, routes)
    with pytest.raises(RoutingMismatch, match=numbers):
        trainer.step(BATCH, routes)
    after = trainer.weights()
    assert all((after[name] == before[name]).all() for name in before)


# Steps


def test_a_step_under_replay_moves_every_router(trainer, model):
    trainer.open_model(model, make_config())
    before = trainer.weights()
    seen = trainer.step(BATCH, foreign_routes())
    after = trainer.weights()
    gates = [name for name in before if name.endswith("mlp.gate.weight")]
    assert len(gates) == len(LAYERS)
    assert seen.grad_norm > 0
    assert all((before[name] != after[name]).any(axis=1).all() for name in gates)


def test_a_step_reports_what_it_saw_before_it_changed_the_weights(trainer, model):
    trainer.open_model(model, make_config())
    scored = trainer.score(BATCH, foreign_routes())
    stepped = trainer.step(BATCH, foreign_routes())
    assert scored.entropy  # which a step does not compute
    assert_same(replace(scored, entropy=[]), stepped, tolerance=2e-5)
    assert largest_difference(stepped.log_probs, trainer.score(BATCH, foreign_routes()).log_probs) > 1e-2


def test_recompute_gives_the_same_step_under_foreign_routes(trainer, model):
    found = []
    for recompute in (False, True):
        trainer.open_model(model, make_config({"recompute": recompute, "micro_batch_tokens": 24}))
        seen = trainer.step(BATCH, foreign_routes())
        found.append((seen, trainer.weights()))
    (kept, kept_weights), (recomputed, recomputed_weights) = found
    assert_same(kept, recomputed)
    assert recomputed.grad_norm == kept.grad_norm
    for name, value in kept_weights.items():
        np.testing.assert_array_equal(value, recomputed_weights[name], err_msg=name)


def test_routes_of_a_step_do_not_leak_into_the_next_pass(trainer, model):
    trainer.open_model(model, make_config({"learning_rate": 1e-30}))
    live = trainer.score(BATCH, None)
    trainer.step(BATCH, foreign_routes())
    assert_same(live, trainer.score(BATCH, None))


def test_every_policy_loss_is_in_verls_registry(trainer):
    assert set(get_args(PolicyLoss)) <= set(trainer.registered_losses())


@pytest.mark.parametrize("name", [*PRESETS, *(f"r3+{loss}" for loss in get_args(PolicyLoss))])
def test_every_preset_and_policy_loss_takes_a_step(trainer, model, name):
    preset, _, loss = name.partition("+")
    config = make_config(method={"name": preset, **({"policy_loss": loss} if loss else {})})
    trainer.open_model(model, config)
    batch = BATCH
    if config.method.importance_threshold is not None:
        batch = replace(BATCH, importance_NS=np.full_like(BATCH.old_NS, 0.5))
    before = trainer.weights()
    seen = trainer.step(batch, None if config.method.route_source == "none" else foreign_routes())
    after = trainer.weights()
    assert np.isfinite([seen.loss, seen.grad_norm]).all()
    assert seen.grad_norm > 0
    assert all(np.isfinite(value).all() for value in after.values())
    assert any((after[key] != before[key]).any() for key in before)


def test_importance_weights_scale_the_loss(trainer, model):
    losses = []
    for weight in (1.0, 0.5):
        trainer.open_model(model, make_config(method="tis"))
        weighted = replace(BATCH, importance_NS=np.full_like(BATCH.old_NS, weight))
        losses.append(trainer.step(weighted, None).loss)
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-5)


LOWER = 0.25


def optimizer_scalars(folder: Path) -> dict:
    return json.loads((folder / "optimizer" / "scalars.json").read_text())


def test_a_scaled_step_is_that_of_a_scaled_learning_rate_and_the_schedule_goes_on_undisturbed(trainer, model, tmp_path):
    after = {}
    for name, rate, factor in (("scaled", 1e-2, LOWER), ("lower", LOWER * 1e-2, 1.0), ("undisturbed", 1e-2, 1.0)):
        trainer.open_model(model, make_config({"learning_rate": rate, "weight_decay": 0.1}))
        trainer.step(BATCH, foreign_routes(), Asked(lr_factor=factor))
        after[name] = trainer.weights()
        trainer.save(tmp_path / name)

    assert all((after["scaled"][key] == after["lower"][key]).all() for key in after["scaled"])
    assert any((after["scaled"][key] != after["undisturbed"][key]).any() for key in after["scaled"])
    assert optimizer_scalars(tmp_path / "scaled") == optimizer_scalars(tmp_path / "undisturbed")
    assert optimizer_scalars(tmp_path / "scaled") != optimizer_scalars(tmp_path / "lower")


# Weights and checkpoints


WARMING_UP: RunConfig = make_config({"warmup_steps": 4, "adam_betas": (0.8, 0.95), "weight_decay": 0.1})


@pytest.fixture
def checkpoint(trainer, model, tmp_path) -> tuple[Path, dict[str, np.ndarray], Seen, dict[str, np.ndarray]]:
    """A checkpoint after two steps, its weights, and what two more saw and made without a reload."""
    trainer.open_model(model, WARMING_UP)
    for _ in range(2):
        trainer.step(BATCH, foreign_routes())
    saved = trainer.weights()
    trainer.save(tmp_path / "checkpoint")
    # The learning rate of the first is the optimizer's, that of the second the scheduler's.
    trainer.step(BATCH, foreign_routes())
    seen = trainer.step(BATCH, foreign_routes())
    return tmp_path / "checkpoint", saved, seen, trainer.weights()


def test_steps_after_a_reload_equal_those_without_to_the_last_bit(trainer, model, checkpoint):
    folder, saved, seen, expected = checkpoint
    trainer.open_model(model, WARMING_UP)
    trainer.load(folder, "saved", True)
    for name, value in trainer.weights().items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)
    trainer.step(BATCH, foreign_routes())
    again = trainer.step(BATCH, foreign_routes())
    assert_same(seen, again)
    assert (again.loss, again.grad_norm) == (seen.loss, seen.grad_norm)
    for name, value in trainer.weights().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_checkpoint_of_a_model_that_took_no_step_goes_on_as_the_model_does(trainer, model, tmp_path):
    found = []
    for saves in (False, True):
        trainer.open_model(model, WARMING_UP)
        if saves:
            trainer.save(tmp_path)
        trainer.step(BATCH, foreign_routes())
        found.append((trainer.step(BATCH, foreign_routes()), trainer.weights()))
    trainer.open_model(model, WARMING_UP)
    trainer.load(tmp_path, "saved", True)
    trainer.step(BATCH, foreign_routes())
    found.append((trainer.step(BATCH, foreign_routes()), trainer.weights()))

    assert list((tmp_path / "optimizer").glob("*.safetensors")) == []
    (expected, weights), *others = found
    for seen, other in others:
        assert_same(expected, seen)
        for name, value in weights.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_a_checkpoint_goes_on_under_the_optimizers_settings_of_another_config(trainer, model, checkpoint, tmp_path):
    folder, saved, _, _ = checkpoint
    other = {"learning_rate": 4e-3, "warmup_steps": 8, "adam_betas": (0.7, 0.9), "weight_decay": 0.3}
    trainer.open_model(model, make_config(other))
    trainer.load(folder, "saved", True)
    trainer.save(tmp_path / "again")
    trainer.step(BATCH, foreign_routes())

    before, after = optimizer_scalars(folder), optimizer_scalars(tmp_path / "again")
    (group,) = after["param_groups"]
    assert (group["lr"], group["initial_lr"]) == (4e-3 * 2 / 8, 4e-3)
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.7, 0.9), 0.3)
    assert after["scheduler"]["base_lrs"] == [4e-3]
    assert after["scheduler"]["last_epoch"] == before["scheduler"]["last_epoch"] == 2
    moments = "optimizer/optimizer.safetensors"
    assert (tmp_path / "again" / moments).read_bytes() == (folder / moments).read_bytes()
    # Adam's step is about as long as the learning rate, whatever the gradient's scale.
    decayed = {name: value * (1 - 1e-3 * 0.3) for name, value in saved.items()}
    assert max(np.abs(value - decayed[name]).max() for name, value in trainer.weights().items()) < 3e-3


def test_weights_alone_do_not_make_a_reload_exact(trainer, model, checkpoint):
    folder, _, _, expected = checkpoint
    trainer.open_model(model, WARMING_UP)
    trainer.load(folder / "huggingface", "weights of the checkpoint", False)
    for _ in range(2):
        trainer.step(BATCH, foreign_routes())
    assert any((value != expected[name]).any() for name, value in trainer.weights().items())


def test_a_checkpoint_holds_no_pickle_and_is_a_model_of_transformers(trainer, model, checkpoint):
    folder, saved, _, _ = checkpoint
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert all(not path.read_bytes().startswith((b"PK", b"\x80")) for path in files)
    trainer.open_model(model, WARMING_UP)
    trainer.load(folder, "saved", True)
    seen = trainer.score(BATCH, None)
    for number, pair in enumerate(zip(BATCH.prompts, BATCH.responses, strict=True)):
        expected = reference(folder / "huggingface", *pair, 1.0)
        np.testing.assert_allclose(seen.log_probs[number], expected.log_probs_S, rtol=0, atol=2e-5)
    # Two moments and a step count for each parameter.
    slots = {key for shard in (folder / "optimizer").glob("*.safetensors") for key in load_file(shard)}
    assert len(slots) == 3 * len(saved)
    assert json.loads((folder / "huggingface" / "config.json").read_text())["model_type"] == "qwen3_moe"


def test_weights_held_already_are_not_loaded_again_and_a_step_forgets_their_name(trainer, model):
    trainer.open_model(model, make_config())
    assert not trainer.load(model, "initial", False)
    trainer.step(BATCH, None)
    assert trainer.name_of_weights() is None
    assert trainer.load(model, "initial", False)
    assert trainer.name_of_weights() == "initial"
    untouched = load_file(model / "model.safetensors")
    held = trainer.weights()
    name = "model.layers.0.mlp.gate.weight"
    np.testing.assert_array_equal(held[name], untouched[name])


# Models


def test_a_dense_model_is_refused(trainer, tmp_path):
    with pytest.raises(ConfigError, match="dense models have no routes"):
        trainer.open_model(write_random(tmp_path, "qwen3"), make_config())


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_model_with_a_dense_layer_first_trains_by_its_layer_map(trainer, tmp_path, family):
    folder = write_random(tmp_path, family)
    assert trainer.open_model(folder, make_config()) == (E, K, (1, 2))
    routes = foreign_routes(layers=(1, 2))
    before = trainer.weights()
    seen = trainer.step(BATCH, routes)
    after = trainer.weights()
    assert np.isfinite([seen.loss, seen.grad_norm]).all()
    gates = [name for name in before if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert all((before[name] != after[name]).any() for name in gates)
    live = trainer.score(BATCH, None)
    assert_same(live, trainer.score(BATCH, traces(live.live, layers=(1, 2))))


def test_the_embedded_model_trains_and_its_checkpoint_is_whole(trainer, assets, tmp_path):
    config = make_config({"micro_batch_tokens": 64})
    assert trainer.open_model(assets.model, config) == (16, 2, (0, 1, 2, 3))
    routes = foreign_routes(experts=16, layers=(0, 1, 2, 3))
    trainer.step(BATCH, routes)
    trainer.save(tmp_path)
    expected = trainer.step(BATCH, routes), trainer.weights()
    trainer.load(tmp_path, "saved", True)
    again = trainer.step(BATCH, routes), trainer.weights()
    assert_same(expected[0], again[0])
    for name, value in expected[1].items():
        np.testing.assert_array_equal(value, again[1][name], err_msg=name)


# Memory


def test_a_pass_that_finds_no_memory_says_with_how_much_and_a_smaller_micro_batch_passes(trainer, model):
    # More than what earlier tests have left free in the process.
    batch = random_batch(sequences=6000)
    tokens = sum(map(len, batch.prompts + batch.responses))
    limit = 20_000_000
    trainer.open_model(model, make_config({"micro_batch_tokens": 400_000}))
    with pytest.raises(
        OutOfMemory, match=f"6000 sequences of {tokens} tokens, in micro-batches of up to {tokens}"
    ) as e:
        trainer.score_in_little_memory(batch, limit)
    assert e.value.transient
    assert e.value.micro_batch_tokens == tokens
    trainer.open_model(model, make_config({"micro_batch_tokens": 2000}))
    assert len(trainer.score_in_little_memory(batch, limit).log_probs) == 6000
