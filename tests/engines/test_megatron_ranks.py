"""Ranks of verl's Megatron engine under Ray on CPUs, which share out experts or layers, against one rank of FSDP2."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from megatron_passes import ENVIRONMENT, MEGATRON, TRAINING, assert_same_passes, captured, passes_of
from models import write_random
from passes import BATCH, assert_same_pass
from safetensors.numpy import load_file
from trainer import E, K, Trainer
from training_calls import Seen, make_config

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from moe_replay.config import RunConfig
from moe_replay.engines.process import EngineProcess

pytestmark = pytest.mark.slow

LAYERS = 4  # two for each stage


def config_of(**sizes: int) -> RunConfig:
    return make_config(MEGATRON, method="r3", resources={f"training_{name}": ranks for name, ranks in sizes.items()})


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "deep", "qwen3_moe", num_hidden_layers=LAYERS)


@contextmanager
def started(log: Path) -> Iterator[Trainer]:
    with pytest.MonkeyPatch.context() as patch:
        # Where Ray's workers find what they import with verl.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        process = EngineProcess("training_calls:Bench", (), "training", log, ENVIRONMENT)
    try:
        yield Trainer(process)
    finally:
        process.stop()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Trainer]:
    with started(tmp_path / "training.log") as trainer:
        yield trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, deep: Path) -> Iterator[Trainer]:
    """One rank of Megatron."""
    with started(tmp_path_factory.mktemp("logs") / "training.log") as trainer:
        trainer.open_model(deep, config_of())
        yield trainer


@pytest.mark.parametrize(
    "sizes",
    [
        {"world_size": 2},
        {"world_size": 2, "expert_parallel_size": 2},
        {"world_size": 2, "pipeline_parallel_size": 2},
        {"world_size": 4, "expert_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
    ids=str,
)
def test_ranks_see_and_do_what_one_of_fsdp2_does_and_go_on_from_any_checkpoint(
    trainer, ranks, alone, deep, sizes, tmp_path
):
    trainer.open_model(deep, make_config(TRAINING, method="r3"))
    assert ranks.open_model(deep, config_of(**sizes)) == (E, K, tuple(range(LAYERS)))
    assert_same_passes(passes_of(ranks, layers=LAYERS), passes_of(trainer, layers=LAYERS))

    theirs, of_one = folders = tmp_path / "of ranks", tmp_path / "of one"
    for folder in folders:
        folder.mkdir()
    ranks.save(theirs)
    straight = gone_on(ranks)
    alone.load_weights(theirs, f"of {sizes}", True)
    alone.save(of_one)
    assert_same(gone_on(alone), straight)
    ranks.load_weights(of_one, "of one", True)
    assert_same(gone_on(ranks), straight)
    ours, again = (load_file(folder / "megatron_optimizer" / "optimizer.safetensors") for folder in folders)
    assert ours.keys() == again.keys()
    assert all((ours[name] == again[name]).all() for name in ours)


def gone_on(trainer: Trainer) -> list[Seen]:
    return [trainer.step(BATCH, captured(LAYERS)), trainer.step(BATCH, None), trainer.score(BATCH, None)]


def assert_same(ours: list[Seen], theirs: list[Seen]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_pass(mine, other)
        assert mine.grad_norm == pytest.approx(other.grad_norm, abs=1e-5)
