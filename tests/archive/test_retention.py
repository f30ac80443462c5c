"""Retention: of what is committed what goes, what stays, and that a run goes on after it."""

import os
import time
import uuid
from datetime import timedelta

import pytest
from archive_samples import DIGEST, commit_routes, make_trace
from cleaning_samples import NO_GRACE, STAGE_OBJECTS, clean, commit_run, commit_stage, inputs_of, listing
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.layout import STAGES
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.routes import RouteArchive
from moe_replay.errors import ConfigError


def test_of_older_iterations_the_objects_go_and_the_commits_stay(store):
    refs = commit_run(store)
    assert len(clean(store, Retention(keep_iterations=2))) == 6
    for (iteration, stage), ref in refs.items():
        artifact = store.open(ref)
        assert artifact.commit.metrics == {f"{stage}/iteration": iteration}
        assert store.verify(ref) == []
        is_gone = iteration < 2 and stage != "evaluation"
        assert (artifact.kept == []) == is_gone
        if is_gone:
            assert "not of the last 2 iterations" in str(artifact.expiry)
    objects = [path.rsplit("/", 1)[1] for path in listing(store) if path < "iterations/00002"]
    assert sorted(name for name in objects if not name.startswith("_")) == ["scores.parquet"] * 2


def test_an_expired_artifact_says_when_and_why_it_went(store, tmp_path):
    refs = commit_run(store)
    clean(store, Retention(keep_iterations=1))
    artifact = store.open(refs[0, "training"])
    reads = [
        lambda: artifact.read_bytes("metrics.json"),
        lambda: artifact.localize(tmp_path / "cache", "checkpoint"),
        lambda: store.open(refs[0, "routes"]).zarr_store("routes"),
    ]
    for read in reads:
        with pytest.raises(ConfigError, match=r"removed by retention on 20..-..-.. \(not of the last 1 iterations\)"):
            read()


def test_expired_routes_are_no_damage(store):
    store.create_run({})
    ref = commit_routes(store, [make_trace(3)])
    commit_stage(store, 1, "training", {})
    clean(store, Retention(keep_iterations=1))
    assert store.verify(ref) == []
    with pytest.raises(ConfigError, match="removed by retention"):
        RouteArchive.open(store.open(ref))


def test_the_status_of_an_expired_stage_tells_what_is_gone(store):
    commit_run(store)
    clean(store, Retention(keep_last_checkpoint=True))
    status = {stage.stage: stage for stage in store.status(0)}
    assert status["training"].state == "committed"
    assert status["training"].bytes - status["training"].expired_bytes == len(b"{}0")
    assert status["rollout"].expired_bytes == 0


def test_of_checkpoints_the_last_is_kept_and_of_others_the_rest(store, tmp_path):
    refs = commit_run(store)
    names = clean(store, Retention(keep_last_checkpoint=True))
    assert names == [f"run-1/iterations/0000{n}/training/checkpoint" for n in range(3)]
    assert store.open(refs[0, "training"]).read_bytes("metrics.json") == b"{}0"
    store.open(refs[3, "training"]).localize(tmp_path / "cache", "checkpoint")
    assert clean(store, Retention(keep_last_checkpoint=True)) == []
    assert len(clean(store, Retention(keep_iterations=1, keep_last_checkpoint=True))) == 9


def test_age_is_that_of_the_commit(local_store, tmp_path):
    refs = commit_run(local_store)
    old = tmp_path / "run-1" / refs[0, "rollout"].uri / "_committed.json"
    os.utime(old, (time.time() - 40 * 86400,) * 2)
    (found,) = find_removable(local_store, Retention(older_than=timedelta(days=30))).removable
    assert (found.name, found.why) == ("run-1/iterations/00000/rollout", "committed more than 30 days ago")


def test_folders_that_became_empty_go_too(local_store, tmp_path):
    refs = commit_run(local_store)
    clean(local_store, Retention(keep_iterations=1))
    left = sorted(path.name for path in (tmp_path / "run-1" / refs[0, "training"].uri).iterdir())
    assert left == ["_committed.json", "_objects-" + refs[0, "training"].sha256 + ".json", "_timing.json"]


@pytest.mark.parametrize("num_stages", range(1, 13))
def test_a_run_stopped_after_any_stage_goes_on_after_the_strictest_cleaning(tmp_path, num_stages):
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    refs = commit_run(store, num_stages)
    clean(store, Retention(NO_GRACE, 1, True))
    for (iteration, stage), ref in refs.items():
        assert store.find(stage, iteration, inputs_of(refs, iteration, stage), DIGEST) == ref
    # The next stage opens what it is made from.
    iteration, stage = num_stages // 4, list(STAGE_OBJECTS)[num_stages % 4]
    for name, ref in inputs_of(refs, iteration, stage).items():
        store.open(ref).localize(tmp_path / "cache", "checkpoint" if name == "policy" else "")
    commit_stage(store, iteration, stage, inputs_of(refs, iteration, stage))


leftovers = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(STAGES), st.sampled_from(["attempt", "stray", "partial", "pointer"])),
    max_size=6,
)


retentions = st.builds(Retention, st.none() | st.just(NO_GRACE), st.none() | st.integers(1, 4), st.booleans())


def leave(store, iteration, stage, kind) -> None:
    """What a writer that died at some moment leaves, in a stage that is committed or not."""
    attempt = f"_attempt-{stage}-{uuid.uuid4().hex}"
    name = {
        "attempt": f"{attempt}/checkpoint/model",
        "stray": f"{stage}/routes/ids/c/9",
        "partial": f"{stage}/._committed.json.{uuid.uuid4().hex}",
        "pointer": f"{stage}/_objects-{'f' * 64}.json",
    }[kind]
    store.folder.write(f"iterations/{iteration:05d}/{name}", b"leftover")


def place_of(path) -> tuple[int, str]:
    _, iteration, stage, _ = path.split("/", 3)
    return int(iteration), stage


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), leftovers, retentions, st.booleans())
def test_nothing_that_a_commit_refers_to_ever_goes_unasked(tmp_path_factory, num_stages, left, retention, remote):
    root = f"memory://{uuid.uuid4().hex}" if remote else str(tmp_path_factory.mktemp("cleaned"))
    store = RunStore(root, "run-1")
    refs = commit_run(store, num_stages)
    committed = listing(store)
    for leftover in left:
        leave(store, *leftover)
    # What a resumed run is about to refer to: placements of stages without a commit.
    held = {path for path in listing(store) if "/_objects-" in path and place_of(path) not in refs}
    clean(store)
    assert listing(store).keys() == committed.keys() | held

    clean(store, retention)
    assert clean(store, retention) == []
    newest = max((iteration for iteration, stage in refs if stage == "training"), default=0)
    for (iteration, stage), ref in refs.items():
        assert store.find(stage, iteration, inputs_of(refs, iteration, stage), DIGEST) == ref
        assert store.verify(ref) == []
        if iteration >= newest or stage == "evaluation":
            assert store.open(ref).expiry is None


@pytest.mark.parametrize(("iterations", "kept"), [(1, [0]), (2, [0, 1]), (3, [1, 2])])
def test_a_run_whose_rollouts_are_one_step_off_keeps_the_checkpoint_that_the_next_is_sampled_from(
    store, iterations, kept
):
    store.create_run({"seed": 1})
    model = ArtifactRef(uri="model://initial", sha256="0" * 64)
    trained = []
    for n in range(iterations):
        rollout = commit_stage(store, n, "rollout", {"policy": [model, model, *trained][n]})
        trained.append(commit_stage(store, n, "training", {"policy": [model, *trained][n], "rollout": rollout}))
    clean(store, Retention(keep_last_checkpoint=True))
    assert [n for n, training in enumerate(trained) if store.open(training).expiry is None] == kept
