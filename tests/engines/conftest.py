"""The process in which verl works, shared by the tests of training and of rollout."""

from collections.abc import Iterator

import pytest

from moe_replay.engines.process import EngineProcess


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A `training_calls.Bench`: verl is imported once, and training engines are built on it as tests need them."""
    logs = tmp_path_factory.mktemp("logs")
    process = EngineProcess("training_calls:Bench", (), "training", logs / "training.log", {"OMP_NUM_THREADS": "1"})
    yield process
    process.stop()
