"""Packed micro-batches, on one rank and on two that share each sequence, against padded ones: the same steps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from models import same_sets
from passes import BATCH, ROUTES, SAMPLED, TRAINING, assert_close, assert_same_pass, gradients
from trainer import LAYERS, E, Trainer, largest_difference
from training_calls import Asked, Seen, make_config

from moe_replay.config import RunConfig
from moe_replay.engines.process import EngineProcess
from moe_replay.errors import ConfigError

SHARED = {"training_world_size": 2, "training_sequence_parallel_size": 2}


class Seens(NamedTuple):
    live: Seen
    predicted: Seen
    step: Seen
    gradients: dict[str, np.ndarray]


def config_of(training: dict, **resources: int) -> RunConfig:
    return make_config(TRAINING | training, method="r3", resources=resources)


def seen_by(trainer: Trainer, model: Path, config: RunConfig, folder: Path) -> Seens:
    """What each kind of pass sees, and the gradients of a replayed step."""
    assert trainer.open_model(model, config) == (E, 2, LAYERS)
    drawn = np.random.default_rng(2)
    predictor = {layer: drawn.normal(0, 0.3, (E, 32)).astype("float32") for layer in LAYERS}
    live = trainer.score(BATCH, None)
    predicted = trainer.score(BATCH, None, Asked(reference=ROUTES, predictor=predictor))
    step = trainer.step(BATCH, ROUTES, Asked(sampled=SAMPLED))
    return Seens(live, predicted, step, gradients(trainer, folder))


def assert_same_seens(one: Seens, other: Seens) -> None:
    for a, b in zip(one[:3], other[:3], strict=True):
        assert_same_pass(a, b)
    assert largest_difference(one.live.entropy, other.live.entropy) < 1e-5
    assert not all(same_sets(a, b).all() for a, b in zip(one.predicted.live, one.predicted.routed, strict=True))
    assert all(same_sets(a, b).all() for a, b in zip(one.predicted.routed, other.predicted.routed, strict=True))
    assert len(other.step.hidden_SLH) == sum(map(len, SAMPLED))
    np.testing.assert_allclose(other.step.hidden_SLH, one.step.hidden_SLH, rtol=0, atol=1e-5)
    np.testing.assert_allclose(other.step.logits_SLE, one.step.logits_SLE, rtol=0, atol=1e-5)
    assert other.step.loss == pytest.approx(one.step.loss, abs=1e-5)
    assert other.step.grad_norm == pytest.approx(one.step.grad_norm, abs=1e-5)
    assert one.step.grad_norm > 1e-2
    assert_close(one.gradients, other.gradients)


@pytest.fixture(scope="module")
def padded(bench: EngineProcess, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seens:
    return seen_by(Trainer(bench), model, config_of({}), tmp_path_factory.mktemp("padded"))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    log = tmp_path_factory.mktemp("logs") / "training.log"
    process = EngineProcess("training_calls:Bench", (), "training", log, {"OMP_NUM_THREADS": "1"})
    yield Trainer(process)
    process.stop()


@pytest.mark.parametrize("training", [{"packing": True}, {"packing": True, "recompute": True}], ids=str)
def test_one_rank_sees_and_does_the_same(trainer, padded, model, training, tmp_path):
    assert_same_seens(padded, seen_by(trainer, model, config_of(training), tmp_path))


@pytest.mark.slow
def test_two_ranks_that_share_sequences_see_and_do_the_same(sharing, padded, model, tmp_path):
    # 13 tokens on each rank hold the longest sequence of 24, whose parts end within others.
    config = config_of({"packing": True, "micro_batch_tokens": 13, "recompute": True}, **SHARED)
    assert_same_seens(padded, seen_by(sharing, model, config, tmp_path))
    written = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    assert written["attn_implementation"] == "sdpa"  # any machine loads it, whatever these ranks attended with


def test_flash_attention_that_is_not_installed_is_refused(trainer, model):
    with pytest.raises(ConfigError, match=r"takes a GPU and the package flash-attn.*training.attention = 'sdpa'"):
        trainer.open_model(model, config_of({"attention": "flash_attention_2", "dtype": "bfloat16"}))
