"""Runs that go on otherwise than they began: longer, again from a stage, as a fork."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from asking import mlflow, mlflow_steps
from command import run_json
from kills import committed_bytes


@pytest.mark.slow
@pytest.mark.parametrize("from_stage", [(), ("--from-stage=training", "--iteration=0", "--yes")])
def test_a_run_that_is_made_longer_has_the_bytes_of_one_that_was_as_long_at_first(
    from_stage: tuple[str, ...], exact_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "exact"
    shutil.copytree(exact_run[0], run)
    shutil.rmtree(run / "iterations/00001")
    document = json.loads((run / "run.json").read_text())
    document["config"]["iterations"] = 1
    (run / "run.json").write_text(json.dumps(document))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("_committed.json")}

    longer = ("--set=iterations=2", "--allow-config-change=iterations")
    said = run_json("resume", "exact", f"--root={tmp_path.as_uri()}", *longer, *from_stage)

    assert committed_bytes(run) == committed_bytes(exact_run[0])
    assert mlflow_steps(said["mlflow_run_id"], "mismatch/kl_k3") == [0, 1]
    assert mlflow().get_run(said["mlflow_run_id"]).data.tags["iterations"] == "2"
    made_again = {path.parent.name for path, moment in before.items() if path.stat().st_mtime_ns != moment}
    assert made_again == ({"training", "evaluation"} if from_stage else set())


@pytest.mark.slow
def test_a_fork_under_the_same_settings_makes_the_bytes_of_its_source(
    exact_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source = f"--root={exact_run[0].parent.as_uri()}"
    forked = run_json("fork", "exact", "--iteration=1", "--as=branch", source, f"--new-root={tmp_path}")
    said = run_json("resume", "branch", f"--root={tmp_path}")

    assert (forked["first_iteration"], said["first_iteration"], len(said["iterations"])) == (1, 1, 1)
    ours, theirs = (committed_bytes(run) for run in (tmp_path / "branch", exact_run[0]))
    expected = {name: data for name, data in theirs.items() if name.startswith("iterations/00001/")}
    assert ours.keys() == expected.keys()
    # Commits, and the provenance of routes, name the run.
    differing = {name.partition("/00001/")[2] for name, data in expected.items() if ours[name] != data}
    stages = ("rollout", "routes", "training", "evaluation")
    assert differing == {f"{stage}/_committed.json" for stage in stages} | {"routes/routes/zarr.json"}
    tracked = mlflow().get_run(said["mlflow_run_id"])
    assert (tracked.data.tags["forked_from"], tracked.info.status) == ("exact@1", "FINISHED")
    assert mlflow_steps(said["mlflow_run_id"], "reward/mean") == [1]
