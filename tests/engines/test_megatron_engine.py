"""verl's Megatron engine on a CPU against its FSDP2 engine: the same passes, steps and checkpoints.

`megatron_on_cpu` says what differs there from Megatron on a GPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron_passes import ENVIRONMENT, MEGATRON, TRAINING, assert_same_passes, captured, passes_of
from models import same_sets, write_random
from passes import BATCH, LENGTHS, assert_same_pass
from safetensors.numpy import load_file
from trainer import LAYERS, E, K, Trainer, foreign_routes, largest_difference
from training_calls import Asked, make_config

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from moe_replay.engines.process import EngineProcess
from moe_replay.errors import ArchiveCorrupt, ConfigError, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace

ROUTES = captured(len(LAYERS))


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    log = tmp_path_factory.mktemp("logs") / "training.log"
    process = EngineProcess("training_calls:Bench", (), "training", log, ENVIRONMENT)
    yield Trainer(process)
    process.stop()


@pytest.fixture(scope="module")
def normalised(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with weights normalised over the chosen experts, as released Qwen3-MoE models have them."""
    folder = tmp_path_factory.mktemp("models") / "normalised"
    write_random(folder, "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True, "rope_parameters": rotary}))
    return folder


@pytest.mark.parametrize("method", ["r3", "gspo", "tis"])
def test_passes_and_steps_are_those_of_fsdp2(trainer, megatron, model, method):
    trainer.open_model(model, make_config(TRAINING, method=method))
    assert megatron.open_model(model, make_config(MEGATRON, method=method)) == (E, K, LAYERS)
    assert megatron.hidden_size() == 32
    assert_same_passes(passes_of(megatron, method), passes_of(trainer, method))


@pytest.mark.parametrize("training", [{}, {"recompute": True}], ids=str)
def test_routes_are_followed_and_weights_normalised_where_the_model_says_so(trainer, megatron, normalised, training):
    trainer.open_model(normalised, make_config(TRAINING | training))
    megatron.open_model(normalised, make_config(MEGATRON | training))
    live, replayed = megatron.score(BATCH, None), megatron.score(BATCH, ROUTES)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(live.log_probs[2:], replayed.log_probs[2:], strict=True))
    assert_same_passes(passes_of(megatron), passes_of(trainer))


def test_the_last_row_is_routed_live_whatever_its_route(megatron, model):
    megatron.open_model(model, make_config(MEGATRON))
    without, given = megatron.score(BATCH, ROUTES), megatron.score(BATCH, foreign_routes(LENGTHS))
    assert largest_difference(without.log_probs, given.log_probs) == 0.0
    assert all(same_sets(a, b).all() for a, b in zip(without.live, given.live, strict=True))
    assert [bool(np.isnan(gap[-1]).all()) for gap in without.coverage_gap] == [True] * len(LENGTHS)
    assert not any(np.isnan(gap).any() for gap in given.coverage_gap)


@pytest.mark.parametrize("training", [{}, {"dtype": "bfloat16"}], ids=str)
def test_a_checkpoint_brings_back_weights_optimizer_and_schedule(megatron, model, training, tmp_path):
    megatron.open_model(model, make_config(MEGATRON | training))
    megatron.step(BATCH, ROUTES)
    megatron.step(BATCH, ROUTES)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    megatron.save(folder)
    straight = megatron.step(BATCH, ROUTES), megatron.step(BATCH, None), megatron.score(BATCH, None)
    megatron.load_weights(model, "the start", False)
    megatron.load_weights(folder, "the checkpoint", True)
    resumed = megatron.step(BATCH, ROUTES), megatron.step(BATCH, None), megatron.score(BATCH, None)
    for one, other in zip(straight, resumed, strict=True):
        assert largest_difference(one.log_probs, other.log_probs) == 0.0
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".jinja", ".safetensors"}


def test_weights_are_exported_as_fsdp2_has_them_and_it_loads_them(trainer, megatron, model, tmp_path):
    folders = tmp_path / "fsdp2", tmp_path / "megatron"
    for one, training, folder in zip((trainer, megatron), (TRAINING, MEGATRON), folders, strict=True):
        one.open_model(model, make_config(training))
        one.step(BATCH, ROUTES)
        folder.mkdir()
        one.save(folder)
    theirs, ours = (load_file(folder / "huggingface" / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=2e-5, err_msg=name)
    trainer.load_weights(folders[1] / "huggingface", "exported", False)
    assert_same_pass(trainer.score(BATCH, None), megatron.score(BATCH, None))


def test_a_checkpoint_of_the_other_engine_or_another_model_is_refused(trainer, megatron, model, tmp_path):
    folders = tmp_path / "fsdp2", tmp_path / "megatron"
    for one, training, folder in zip((trainer, megatron), (TRAINING, MEGATRON), folders, strict=True):
        one.open_model(model, make_config(training))
        one.step(BATCH, None)
        folder.mkdir()
        one.save(folder)
    with pytest.raises(ConfigError, match=r"no optimizer state of training.engine = 'megatron'.*'fsdp2'"):
        megatron.load_weights(folders[0], "theirs", True)
    with pytest.raises(ConfigError, match=r"no optimizer state of training.engine = 'fsdp2'.*'megatron'"):
        trainer.load_weights(folders[1], "ours", True)
    state = folders[1] / "megatron_optimizer"
    (state / "optimizer.safetensors").replace(state / "optimizer.bin")
    with pytest.raises(ArchiveCorrupt, match="does not fit 72 of this rank's 72 parameters"):
        megatron.load_weights(folders[1], "broken", True)


def test_what_verls_engine_has_nothing_for_is_refused(megatron, model):
    megatron.open_model(model, make_config(MEGATRON))
    valid_T = np.arange(LENGTHS[2]) != 3
    ids_TLK = foreign_routes(LENGTHS)[2].ids_TLK * valid_T[:, None, None]
    gap = RoutingTrace(ids_TLK.astype("uint8"), valid_T, E, LAYERS)
    with pytest.raises(RoutingMismatch, match=rf"sequence 2 has routes of {LENGTHS[2] - 1} of its {LENGTHS[2]} rows"):
        megatron.score(BATCH, [*ROUTES[:2], gap, *ROUTES[3:]])
    predictor = {layer: np.zeros((E, 32), dtype="float32") for layer in LAYERS}
    with pytest.raises(ConfigError, match="verl's Megatron engine does not"):
        megatron.score(BATCH, None, Asked(predictor=predictor))
    assert np.isfinite(megatron.score(BATCH, ROUTES).log_probs[0]).all()
