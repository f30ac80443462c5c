"""Taking back what is committed: what goes, what stays, what gc sees of it, on a local disk and on object storage."""

import os
import shutil
import signal
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from archive_samples import DIGEST
from stepped_store import Killed, Turns, stepped_run
from sudden_death import die_before_change

from moe_replay.alarm import Excess
from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.layout import STAGES
from moe_replay.archive.placement import Placement
from moe_replay.archive.removal import remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.storage import Storage
from moe_replay.archive.superseding import (
    generation_of,
    made_from,
    require_remakeable,
    supersede,
    superseded_artifact,
    superseded_folders,
)
from moe_replay.config import RunConfig
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.stages.decisions import BatchAlarms

EXCESS = Excess("mismatch/kl_k3", 0.25, 0.125)
INITIAL = ArtifactRef(uri="model://initial", sha256="0" * 64)
NO_GRACE = timedelta(0)
LAST = ("training", "predictor", "evaluation")
WHOLE = [(n, stage) for n in range(3) for stage in STAGES]


def commit(store, iteration, stage) -> ArtifactRef:
    """Commit a stage made from what the run has, as PR2 does; equal inputs give equal artifacts."""
    before = iteration - 1

    def ref(name, of=iteration):
        return {name: store.commit_of(name, of)} if of >= 0 else {}

    trained = ref("training", before)
    policy = {"policy": trained["training"] if trained else INITIAL}
    inputs = {
        "rollout": policy | ref("predictor", before),
        "routes": ref("rollout"),
        "training": policy | ref("rollout") | ref("routes"),
        "predictor": ref("training") | ({"previous": ref("predictor", before)["predictor"]} if before >= 0 else {}),
        "evaluation": {"policy": store.commit_of("training", iteration)},
    }[stage]
    writer = store.begin(stage, iteration, inputs, DIGEST)
    writer.write_bytes("checkpoint/model", f"{stage} {iteration}".encode())
    writer.write_bytes("more", b"{}")
    return writer.commit()


def commit_rest(store, iterations=3) -> dict[tuple[int, str], ArtifactRef]:
    """What is committed of so many iterations, after the rest was made."""
    places = [place for place in WHOLE if place[0] < iterations]
    return {place: store.commit_of(place[1], place[0]) or commit(store, *place) for place in places}


def committed(store) -> list[tuple[int, str]]:
    return [place for place in WHOLE if store.commit_of(place[1], place[0]) is not None]


def take_back(store, stage, iteration) -> None:
    supersede(store, made_from(store, stage, iteration))


def decide(store, iteration) -> BatchAlarms:
    """An alarm on the batch of an iteration, and a decision on it."""
    alarms = BatchAlarms(store, iteration, store.commit_of("rollout", iteration))
    alarms.raise_alarm(EXCESS)
    alarms.decide(RunConfig(), "skip", "person")
    return alarms


def removable(store, grace=NO_GRACE) -> list[str]:
    return [one.name for one in find_removable(store, Retention(), grace).removable]


def clean(store, grace=NO_GRACE) -> None:
    for one in find_removable(store, Retention(), grace).removable:
        remove(store.name.rsplit("/", 1)[0], one)


@pytest.fixture
def run(store) -> RunStore:
    """Three committed iterations."""
    store.create_run({"seed": 1}, about={"created_as": "x"})
    commit_rest(store)
    return store


@pytest.mark.parametrize(
    ("stage", "iteration", "kept"),
    [
        ("rollout", 0, 0),
        ("rollout", 1, 5),
        ("training", 1, 7),
        ("predictor", 1, 8),
    ],
)
def test_all_that_was_made_from_it_goes_and_the_rest_stays(run, stage, iteration, kept):
    take_back(run, stage, iteration)
    # An evaluation is made from its training alone.
    also = [(1, "evaluation")] if stage == "predictor" else []
    assert committed(run) == [*WHOLE[:kept], *also]
    assert all(run.verify(run.commit_of(name, n)) == [] for n, name in committed(run))


@pytest.mark.parametrize(("stage", "iteration"), [("evaluation", 1), ("predictor", 2)])
def test_what_nothing_was_made_from_goes_alone(run, stage, iteration):
    before = commit_rest(run)
    take_back(run, stage, iteration)
    assert committed(run) == [place for place in WHOLE if place != (iteration, stage)]
    assert all(run.commit_of(kind, n) == ref for (n, kind), ref in before.items() if (n, kind) != (iteration, stage))
    assert commit_rest(run) == before


def test_what_is_superseded_is_made_again_the_same(run):
    before = commit_rest(run)
    take_back(run, "training", 1)
    assert commit_rest(run) == before
    assert all(run.verify(ref) == [] for ref in before.values())
    # And again: of the very same artifact one is kept.
    take_back(run, "training", 1)
    assert commit_rest(run) == before
    assert len(superseded_folders(run, 1, "training")) == 1


@pytest.mark.parametrize("stage", ["rollout", "routes", "training"])
def test_what_was_decided_on_a_batch_goes_with_its_training(run, stage):
    before = commit_rest(run)
    others, alarms = decide(run, 0), decide(run, 1)
    take_back(run, "evaluation", 1)
    assert len(alarms.decisions()) == 1
    take_back(run, stage, 1)

    # The very same batch, made again.
    assert commit_rest(run) == before
    assert (alarms.waiting(), alarms.decisions()) == (None, ())
    alarms.raise_alarm(EXCESS)
    assert alarms.decide(RunConfig(), "train", "person").action == "train"
    assert len(others.decisions()) == 1
    kept = [path for path in run.folder.files() if "_superseded-training" in path and "/_decision-" in path]
    assert len(kept) == 1
    clean(run)
    assert sum("/_decision-" in path for path in run.folder.files()) == 2


def test_with_a_training_goes_what_was_decided_on_the_next_batch_though_that_stays(store):
    store.create_run({})
    for stage in ("rollout", "routes", "training"):
        commit(store, 0, stage)
    # One step off: of the same policy as the rollout before.
    rollout = store.begin("rollout", 1, store.committed("rollout", 0).commit.inputs, "digest").commit()
    alarms = decide(store, 1)
    take_back(store, "training", 0)
    assert store.commit_of("rollout", 1) == rollout
    assert (alarms.waiting(), alarms.decisions()) == (None, ())


def test_a_decision_goes_with_a_rollout_that_was_not_trained_on_yet(store):
    store.create_run({})
    for stage in ("rollout", "routes"):
        commit(store, 0, stage)
    alarms = decide(store, 0)
    take_back(store, "rollout", 0)
    assert commit(store, 0, "rollout") == alarms.rollout
    assert alarms.decisions() == ()


def test_what_was_made_last_is_taken_back_first(run):
    places = [(one.commit.iteration, one.commit.stage) for one in made_from(run, "training", 1)]
    assert places == [place for place in reversed(WHOLE) if place > (1, "") and place not in WHOLE[5:7]]


def test_nothing_is_made_from_what_is_not_committed(store):
    store.create_run({})
    assert made_from(store, "training", 0) == []


def test_a_generation_is_counted_and_told_before_anything_goes(run):
    assert generation_of(run) == 0
    take_back(run, "training", 2)
    take_back(run, "rollout", 1)
    assert generation_of(run) == 2
    document = run.read_run()
    assert (document["seed"], document["about"]["created_as"]) == (1, "x")
    first, second = document["about"]["superseded"]
    assert (first["stage"], first["iteration"], first["commits"]) == ("training", 2, 3)
    assert (second["stage"], second["iteration"], second["commits"]) == ("rollout", 1, 7)


def test_gc_keeps_what_was_superseded_until_the_grace_is_over_and_then_removes_all_of_it(run):
    take_back(run, "training", 1)
    before = run.folder.files()
    assert removable(run, timedelta(hours=1)) == []
    kept = find_removable(run, Retention(), timedelta(hours=1)).left_alone
    assert len(kept) == 8
    assert all("superseded on" in line for line in kept)
    clean(run, timedelta(hours=1))
    assert run.folder.files() == before

    found = find_removable(run, Retention(), NO_GRACE).removable
    assert len(found) == 8
    assert {one.why for one in found} == {f"superseded on {datetime.now(UTC):%Y-%m-%d}"}
    assert all(one.bytes > len("training 1{}") for one in found)
    clean(run)
    assert removable(run) == []
    assert not any("_superseded" in path for path in run.folder.files())
    assert sum("model" in path for path in run.folder.files()) == 7
    assert all(run.verify(run.commit_of(name, n)) == [] for n, name in committed(run))


def test_gc_tells_what_was_superseded_from_what_was_made_again(run):
    before = commit_rest(run)
    take_back(run, "rollout", 0)
    commit_rest(run)
    clean(run)
    assert removable(run) == []
    assert commit_rest(run) == before
    assert all(run.verify(ref) == [] for ref in before.values())
    assert sum("model" in path for path in run.folder.files()) == len(WHOLE)


def test_an_artifact_superseded_between_search_and_removal_is_kept(monkeypatch):
    """A search that listed before, and read commits after, takes its objects for those of a dead attempt."""
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    store.create_run({})
    commit_rest(store)
    listing = Storage.files

    def superseded_after_listing(storage, deep=True):
        files = listing(storage, deep)
        monkeypatch.undo()
        take_back(store, "training", 2)
        return files

    monkeypatch.setattr(Storage, "files", superseded_after_listing)
    found = find_removable(store, Retention(), NO_GRACE).removable
    assert sum("_attempt-" in one.name for one in found) == len(LAST)
    for one in found:
        remove(store.name.rsplit("/", 1)[0], one)
    kept = [superseded_artifact(store, folder) for folder in superseded_folders(store, 2)]
    assert sorted(artifact.commit.stage for artifact in kept) == sorted(LAST)
    assert all(artifact.problems() == [] for artifact in kept)


def test_a_cleaning_cut_short_is_finished_by_the_next(run):
    take_back(run, "training", 2)
    for one in find_removable(run, Retention(), NO_GRACE).removable:
        run.folder.remove(one.paths[0].partition("/")[2])
    clean(run)
    clean(run)
    assert not any("_superseded" in path for path in run.folder.files())
    assert sum("model" in path for path in run.folder.files()) == 12


def test_what_retention_left_of_the_inputs_decides_whether_it_can_be_made_again(run):
    for one in find_removable(run, Retention(keep_last_checkpoint=True), NO_GRACE).removable:
        remove(run.name.rsplit("/", 1)[0], one)
    # The policy that iteration 1 starts from is gone; the one that iteration 2 starts from too.
    for stage in ("rollout", "training"):
        with pytest.raises(ConfigError, match=r"its policy, .*, were removed by retention .* nothing was superseded"):
            require_remakeable(run, made_from(run, stage, 2))
    require_remakeable(run, made_from(run, "predictor", 2))
    require_remakeable(run, made_from(run, "rollout", 0))


def test_an_input_that_is_lost_is_told_before_anything_is_taken_back(run):
    uri = run.commit_of("routes", 1).uri
    (run.folder / uri).remove("_committed.json")
    with pytest.raises(ArchiveCorrupt, match=r"routes/_committed\.json is missing"):
        require_remakeable(run, made_from(run, "training", 1))


def test_a_run_copied_from_object_storage_to_disk_and_back_can_be_taken_back(tmp_path):
    remote, local = RunStore(f"memory://{uuid.uuid4().hex}", "run-1"), RunStore(str(tmp_path), "run-1")
    remote.create_run({})
    before = commit_rest(remote)
    for path in remote.folder.files():
        local.folder.write(path, remote.folder.read(path))
    take_back(local, "training", 1)
    assert commit_rest(local) == before
    back = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    for path in local.folder.files():
        back.folder.write(path, local.folder.read(path))
    # Objects of what was made again lie in the stage's own folder now.
    take_back(back, "training", 2)
    [folder] = superseded_folders(back, 2, "training")
    assert Placement.read(back.folder / folder, folder[-64:]).folder == "training"
    clean(back, timedelta(hours=1))
    assert commit_rest(back) == before
    clean(back)
    assert all(back.verify(ref) == [] for ref in before.values())


def finish_after_a_kill(store, before) -> None:
    """What a user does then: the same command again, and later gc."""
    # A prefix in the order of the work, but for what nothing was made from: what is there has all it needs.
    left = [store.committed(stage, iteration) for iteration, stage in committed(store)]
    assert [problem for artifact in left for problem in store.lost_inputs(artifact)] == []
    if again := made_from(store, "training", 0):
        supersede(store, again)
    assert committed(store) == WHOLE[:2]
    assert BatchAlarms(store, 0, before[0, "rollout"]).decisions() == ()
    assert commit_rest(store, 1) == before
    clean(store)
    assert removable(store) == []
    assert sum(path.endswith("/model") for path in store.folder.files()) == len(before)
    assert all(store.verify(ref) == [] for ref in before.values())


def test_superseding_killed_before_any_change_is_finished_by_the_same_command_again(tmp_path):
    store = RunStore(str(tmp_path / "made"), "run-1")
    store.create_run({})
    before = commit_rest(store, 1)
    decide(store, 0)
    change, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        root = tmp_path / str(change)
        shutil.copytree(tmp_path / "made", root)
        status = take_back_in_a_child(root, change)
        finish_after_a_kill(RunStore(str(root), "run-1"), before)
        change += 1
    assert status == 0
    # A note and a rename of each of three artifacts, and before them run.json.
    assert change > 8


def test_superseding_killed_before_any_request_to_a_store_is_finished_by_the_same_command_again():
    requests, result = 0, Killed()
    while isinstance(result, Killed):
        store = stepped_run(puts_conditionally=True)
        store.create_run({})
        before = commit_rest(store, 1)
        decide(store, 0)
        [result] = Turns([partial(take_back, store, "training", 0)]).play([], {0: requests})
        finish_after_a_kill(store, before)
        requests += 1
    assert result is None
    # Three artifacts, each copied in four puts and removed in three.
    assert requests > 3 * 7


def take_back_in_a_child(root: Path, change: int) -> int:
    """Supersede in a process that dies before its change of that number; returns how it ended."""
    child = os.fork()
    if child == 0:
        die_before_change(str(root), change)
        take_back(RunStore(str(root), "run-1"), "training", 0)
        os._exit(0)
    return os.waitpid(child, 0)[1]
