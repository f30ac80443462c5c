"""Evaluation of a checkpoint apart from its training, and of nothing new: real vLLM, Prefect server and MLflow."""

import os
import subprocess
import sys
from pathlib import Path

from command import run_json, start
from compared_runs import Compared
from mlflow import MlflowClient

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.lease import holding

EVALUATE = """
import sys
from flows.evaluate import evaluate
evaluate({"storage": {"root": sys.argv[1]}}, "scores")
"""


def test_a_flow_run_leaves_an_evaluation_alone_that_another_runner_works_on(tmp_path: Path) -> None:
    with holding(RunStore(str(tmp_path), "scores").folder, print):
        flow = [sys.executable, "-c", EVALUATE, str(tmp_path)]
        done = subprocess.run(flow, capture_output=True, text=True, timeout=300, check=False)
        assert [path.name for path in (tmp_path / "scores").iterdir()] == ["_lease"]
    assert done.returncode != 0
    assert f"RunInUse: {(tmp_path / 'scores').as_uri()} is in use" in done.stderr


def test_a_checkpoint_is_scored_as_in_training_and_only_once(compared: Compared) -> None:
    root = f"--root={compared.root}"
    said = run_json("evaluate", "all-r3-s0", root)

    assert (said["checkpoint"], said["already_committed"]) == ("all-r3-s0@1", False)
    # The same settings and seeds: the same answers.
    trained = compared.store("r3").committed("evaluation", 1)
    assert trained is not None
    assert said["scores"] == trained.commit.metrics

    again = run_json("evaluate", "all-r3-s0@1", root)

    assert again == {**said, "already_committed": True}
    process = start("evaluate", "all-r3-s0", root, "--quiet")
    assert process.communicate(timeout=600) == (said["evaluation_id"] + "\n", "")
    assert process.returncode == 0
    client = MlflowClient(f"sqlite:///{os.environ['MOE_REPLAY_HOME']}/mlflow.db")
    tracked = client.get_run(said["mlflow_run_id"])
    assert (tracked.info.status, tracked.data.tags["moe_replay.evaluation_of"]) == ("FINISHED", "all-r3-s0")
    for name in said["scores"]:
        assert [point.step for point in client.get_metric_history(said["mlflow_run_id"], name)] == [1]
    stages = run_json("status", said["evaluation_id"], root)["stages"]
    assert [(stage["iteration"], stage["stage"]) for stage in stages] == [(1, "evaluation")]
    process = start("resume", said["evaluation_id"], root)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is an evaluation of all-r3-s0" in err
