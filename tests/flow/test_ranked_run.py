"""A run whose training is shared by two ranks under Ray, against the same run with one."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from command import EXACT, run_json

from moe_replay.archive.artifacts import RunStore

pytestmark = pytest.mark.slow


def test_a_run_with_two_ranks_measures_what_one_with_one_does_and_goes_on_with_one(
    exact_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    settings = {**EXACT, "evolution.record": "true", "resources.training_world_size": 2}
    command = ("--run-id=ranked", f"--root={tmp_path.as_uri()}")
    run_json("run", *command, "--iterations=1", settings=settings)
    # On other hardware, and under the run's own config but for that.
    more = {"iterations": 2, "resources.training_world_size": 1}
    ranked = run_json(
        "resume", "ranked", f"--root={tmp_path.as_uri()}", "--allow-config-change=iterations", settings=more
    )

    store = RunStore(tmp_path.as_uri(), "ranked")
    assert [store.committed("training", n).commit.attributes.get("training_world_size") for n in (0, 1)] == [2, None]
    assert list(Path(tempfile.gettempdir()).glob("moe-replay-ray-*")) == []
    _, one_rank = exact_run
    for one, two in zip(one_rank["iterations"], ranked["iterations"], strict=True):
        keys = {key for key in one if key.split("/")[0] in ("mismatch", "policy", "routing", "reward", "response")}
        assert keys <= two.keys()
        assert {key: two[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-3, abs=1e-5)
