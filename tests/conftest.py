"""Fixtures shared by all tests: one home with the embedded model for the whole session."""

import os
import tempfile
from pathlib import Path

import pytest

from moe_replay import tiny
from moe_replay.engines.process import no_progress
from moe_replay.environment import set_defaults


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="kills that tests/kill tries")
    parser.addoption("--kill-seed", type=int, default=None, help="repeats the kills of that seed; else it is drawn")


# Before any test is collected: Prefect, which flows import, looks for its home once.
_home = tempfile.TemporaryDirectory(prefix="moe-replay-home-", ignore_cleanup_errors=True)
os.environ["MOE_REPLAY_HOME"] = _home.name
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("MOE_REPLAY_ROOT", None)
# Engines, servers and tests share few cores: threads that wait by spinning keep the others from their work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
set_defaults()


@pytest.fixture(scope="session")
def home() -> Path:
    """MOE_REPLAY_HOME of this session; all state that tests make lies under it."""
    return Path(_home.name)


@pytest.fixture(scope="session")
def assets(home: Path) -> tiny.EmbeddedAssets:
    """The embedded model and its data, made once."""
    return tiny.prepare(home, no_progress)
