"""A run with partial rollouts, undisturbed and killed midway."""

import random
from pathlib import Path

import pytest
from asking import mlflow
from command import run_json
from kills import PATIENT, RUN_ID, KilledRun
from machine import Machine

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.stages.samples import read_answers

pytestmark = pytest.mark.slow

ITERATIONS, STAGES = 3, 4
SETTINGS = {
    **PATIENT,
    "iterations": ITERATIONS,
    "rollout.partial_response_tokens": 3,
    "rollout.oversampled_prompts": 8,
    "method.importance_threshold": 2.0,
}


def test_a_partial_run_trains_on_tokens_of_several_weights_and_goes_on_to_the_same_bytes_when_killed(
    tmp_path: Path, home: Path, prefect_api: str
) -> None:
    root = tmp_path / "undisturbed"
    said = run_json("run", f"--run-id={RUN_ID}", f"--root={root.as_uri()}", settings=SETTINGS)

    store = RunStore(root.as_uri(), RUN_ID)
    for iteration, metrics in enumerate(said["iterations"]):
        rollout, routes = (store.committed(stage, iteration) for stage in ("rollout", "routes"))
        assert rollout is not None
        assert routes is not None
        answers, archive = list(read_answers(rollout)), RouteArchive.open(routes)
        assert len(answers) == 32
        staleness = [iteration - version for answer in answers for version in answer.weight_versions or []]
        assert metrics["rollout/staleness_max"] == max(staleness)
        assert metrics["rollout/staleness_mean"] == pytest.approx(sum(staleness) / len(staleness))
        policies = {origin.weights_sha256 for origin in archive.provenance.origins}
        versions = {version for answer in answers for version in answer.weight_versions or []}
        named = [store.committed("rollout", version) for version in versions]
        assert policies == {one.commit.inputs["policy"].sha256 for one in named if one is not None}
        assert ("carried" in rollout.commit.inputs) == (iteration > 0)
        assert store.verify(routes.ref) == []
    last = said["iterations"][-1]
    # Answers of the embedded task take five tokens: the last batch began in the iteration before.
    assert 0 < last["rollout/carried_tokens"] < 1
    assert any(len(set(answer.weight_versions or [])) > 1 for answer in answers)

    machine = Machine(tmp_path, home / "embedded", f"sqlite:///{home / 'mlflow.db'}", prefect_api)
    killed = KilledRun(machine, tmp_path / "runs", SETTINGS, ITERATIONS * STAGES, random.Random(3))
    killed.kill("everything", after=STAGES, then="fresh checkout")
    killed.kill("engine", after=STAGES, then="none")
    killed.finish()
    assert [one.problem for one in killed.kills] == [None, None]
    assert killed.problems(root / RUN_ID, mlflow(), ITERATIONS) == []
