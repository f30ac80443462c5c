"""Evaluation of a checkpoint apart from its training, and of nothing new: real vLLM, Prefect server and MLflow."""

import os

from command import run_json, start
from compared_runs import Compared
from mlflow import MlflowClient


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
