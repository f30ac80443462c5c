"""The processes in which verl and vLLM work, shared by the tests of training and of rollout, and models for them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from models import write_perturbed, write_random
from rollout_calls import CONFIG
from trainer import Trainer

from moe_replay.data.prompts import PromptTable
from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.engines.rollout import Request
from moe_replay.tiny import EmbeddedAssets


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A `training_calls.Bench`: verl is imported once, and training engines are built on it as tests need them."""
    logs = tmp_path_factory.mktemp("logs")
    process = EngineProcess("training_calls:Bench", (), "training", logs / "training.log", {"OMP_NUM_THREADS": "1"})
    yield process
    process.stop()


@pytest.fixture(scope="session")
def rollout_engine(assets: EmbeddedAssets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that starts from the embedded model."""
    log = tmp_path_factory.mktemp("logs") / "rollout.log"
    arguments = (assets.model, "embedded", CONFIG)
    engine = EngineProcess("moe_replay.engines.rollout:RolloutEngine", arguments, "rollout", log, rollout.ENVIRONMENT)
    yield engine
    engine.stop()


@pytest.fixture
def embedded(rollout_engine: EngineProcess, assets: EmbeddedAssets) -> EngineProcess:
    """The engine with the embedded model's weights, whatever the test before has left."""
    rollout_engine.call("rollout_calls:load", no_progress, assets.model, "embedded")
    return rollout_engine


@pytest.fixture
def trainer(bench: EngineProcess) -> Trainer:
    return Trainer(bench)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="session")
def perturbed(assets: EmbeddedAssets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with other weights."""
    return write_perturbed(assets.model, tmp_path_factory.mktemp("models") / "perturbed")


@pytest.fixture(scope="session")
def questions(assets: EmbeddedAssets) -> list[Request]:
    """Eight of the benchmark's problems, four times each, one with a system prompt."""
    prompts = PromptTable.open(assets.benchmark).take(8)
    asked = [prompt.messages for prompt in prompts for _ in range(4)]
    asked[0] = [{"role": "system", "content": "Add. "}, *asked[0]]
    return [Request(messages, seed) for seed, messages in enumerate(asked)]
