"""The process in which verl works, shared by the tests of training and of rollout, and a random model for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from models import write_random
from trainer import Trainer

from moe_replay.engines.process import EngineProcess


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A `training_calls.Bench`: verl is imported once, and training engines are built on it as tests need them."""
    logs = tmp_path_factory.mktemp("logs")
    process = EngineProcess("training_calls:Bench", (), "training", logs / "training.log", {"OMP_NUM_THREADS": "1"})
    yield process
    process.stop()


@pytest.fixture
def trainer(bench: EngineProcess) -> Trainer:
    return Trainer(bench)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "qwen3_moe", "qwen3_moe")
