"""Runs trained by verl's Megatron engine on CPUs, against the same trained by FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import EXACT, run_json
from variants import VARIANTS

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from moe_replay.archive.artifacts import RunStore

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ENGINES = HERE.parent / "engines"
SETTINGS = {**EXACT, "training.engine": "megatron", "training.packing": "true"}
METRICS = ("mismatch", "policy", "routing", "reward", "response", "predictor")


def megatron_json(*words: str, settings: dict[str, Any]) -> dict[str, Any]:
    """As `run_json`, in processes of which each finds the CPU where Megatron looks for a GPU."""
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    path = os.pathsep.join([str(ENGINES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "megatron_cli.py"), *words, "--json", *sets],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "megatron_on_cpu"},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)


def measured(run: dict[str, Any]) -> list[dict[str, float]]:
    """By iteration, what does not depend on how fast it was."""
    return [{key: value for key, value in one.items() if key.split("/")[0] in METRICS} for one in run["iterations"]]


def trained(folder: Path, run: str) -> list[dict[str, str]]:
    """By iteration, the digests of weights and optimizer."""
    commits = [RunStore(folder.as_uri(), run).committed("training", number).commit for number in (0, 1)]
    return [
        {one.path: one.sha256 for one in commit.objects if one.path.startswith("checkpoint/")} for commit in commits
    ]


@pytest.mark.parametrize("variant", [{"method": "r3"}, VARIANTS["at-once"]], ids=lambda variant: variant["method"])
def test_a_run_measures_what_fsdp2s_does_and_resumes_to_the_same_bytes(variant: dict[str, Any], tmp_path: Path) -> None:
    root, settings = f"--root={tmp_path.as_uri()}", variant | {"evaluation.samples_of": "{}"}
    straight = megatron_json("run", "--run-id=straight", root, "--iterations=2", settings=SETTINGS | settings)
    megatron_json("run", "--run-id=resumed", root, "--iterations=1", settings=SETTINGS | settings)
    resumed = megatron_json("resume", "resumed", root, "--allow-config-change=iterations", settings={"iterations": 2})
    assert measured(resumed) == measured(straight)
    assert trained(tmp_path, "resumed") == trained(tmp_path, "straight")
    predicted = ["predictor/merge_fidelity" in one for one in measured(straight)]
    assert predicted == [False, variant["method"] == "pr2"]

    fsdp2 = run_json("run", "--run-id=fsdp2", root, "--iterations=2", settings=EXACT | settings)
    for ours, theirs in zip(measured(straight), measured(fsdp2), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_run_goes_on_under_other_ranks(exact_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root = f"--root={tmp_path.as_uri()}"
    shared = {"resources.training_world_size": 2, "resources.training_expert_parallel_size": 2}
    megatron_json("run", "--run-id=shared", root, "--iterations=1", settings=SETTINGS | shared)
    alone = {"iterations": 2, **dict.fromkeys(shared, 1)}
    both = megatron_json("resume", "shared", root, "--allow-config-change=iterations", settings=alone)

    store = RunStore(tmp_path.as_uri(), "shared")
    told = [store.committed("training", number).commit.attributes for number in (0, 1)]
    assert [one.get("training_expert_parallel_size") for one in told] == [2, None]
    for ours, theirs in zip(measured(both), measured(exact_run[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
