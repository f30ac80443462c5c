"""Fixtures shared by all tests: one home with the embedded model for the whole session."""

import os
from pathlib import Path

import pytest

from moe_replay import tiny
from moe_replay.engines.process import no_progress
from moe_replay.environment import set_defaults


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="kills that tests/kill tries")
    parser.addoption("--kill-seed", type=int, default=None, help="repeats the kills of that seed; else it is drawn")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MOE_REPLAY_HOME of this session; all state that tests make lies under it."""
    folder = tmp_path_factory.mktemp("home")
    os.environ["MOE_REPLAY_HOME"] = str(folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("MOE_REPLAY_ROOT", None)
    set_defaults()
    return folder


@pytest.fixture(scope="session")
def assets(home: Path) -> tiny.EmbeddedAssets:
    """The embedded model and its data, made once."""
    return tiny.prepare(home, no_progress)
