"""What runs leave that died or were refused: what of it goes, and what never does."""

import os
import time
import uuid
from datetime import timedelta

import pytest
from archive_samples import DIGEST, commit_routes, digests_of, make_trace, origin_of
from cleaning_samples import NO_GRACE, clean, commit_run, listing, root_of

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import IMPORTS_KEY, STAGES, placement_file
from moe_replay.archive.lease import holding
from moe_replay.archive.leftovers import find_probes, find_unborn, runs_under
from moe_replay.archive.removal import Findings, remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.routes import write_routes
from moe_replay.archive.storage import Storage


def test_a_run_without_leftovers_is_left_as_it_is(store):
    commit_run(store)
    before = listing(store)
    assert clean(store) == []
    assert listing(store) == before


def test_a_search_changes_nothing(store):
    commit_run(store)
    store.begin("evaluation", 4, {}, DIGEST).write_bytes("scores.parquet", b"half")
    before = listing(store)
    found = find_removable(store, Retention(NO_GRACE, 1, True), NO_GRACE).removable
    assert len(found) > 5
    assert listing(store) == before


def test_a_dead_attempt_is_found_with_its_bytes_and_removed(store):
    commit_run(store, 3)
    before = listing(store)
    store.begin("evaluation", 0, {}, DIGEST).write_bytes("scores.parquet", b"half")
    (found,) = find_removable(store, grace=NO_GRACE).removable
    assert found.name.startswith("run-1/iterations/00000/_attempt-evaluation-")
    assert found.why == "no commit refers to it"
    assert sorted(path.rsplit("/", 1)[1] for path in found.paths) == ["_attempt.json", "scores.parquet"]
    assert found.bytes > 4
    remove(root_of(store), found)
    assert listing(store) == before


def test_a_discarded_attempt_leaves_the_run_as_it_was(store):
    commit_run(store, 3)
    before = listing(store)
    writer = store.begin("evaluation", 0, {}, DIGEST)
    writer.write_bytes("scores.parquet", b"half")
    writer.discard()
    assert listing(store) == before


def test_a_writer_that_tried_to_commit_discards_nothing(store):
    writer = store.begin("evaluation", 0, {}, DIGEST)
    writer.write_bytes("scores.parquet", b"x")
    ref = writer.commit()
    with pytest.raises(RuntimeError, match="may be committed"):
        writer.discard()
    assert store.verify(ref) == []


def test_an_attempt_at_a_run_that_was_never_made_is_found_and_removed(root):
    store = RunStore(root, "never")
    store.begin("routes", 0, {}, DIGEST).write_bytes("routes/zarr.json", b"{}")
    assert "perhaps by a live writer" in find_unborn(root).left_alone[0]
    (found,) = find_unborn(root, NO_GRACE).removable
    assert found.name.startswith("never/iterations/00000/_attempt-routes-")
    assert len(found.paths) == 2
    remove(root, found)
    assert listing(store) == {}
    assert "never" not in Storage.at(root).folders()


@pytest.mark.parametrize(
    "also",
    [
        "notes.txt",
        "run.json",
        "other/file",
        "iterations/file",
        "iterations/00000/file",
        "iterations/00000/routes/zarr.json",
        f"iterations/00000/routes/{placement_file('f' * 64)}",
        "iterations/00000/_attempt-mine/file",
        f"iterations/mine/_attempt-routes-{'0' * 32}/file",
        f"iterations/00000/_attempt-routes-{'0' * 32}",
    ],
)
def test_a_folder_that_holds_anything_but_attempts_is_not_looked_at(root, also):
    store = RunStore(root, "never")
    store.begin("routes", 0, {}, DIGEST)
    store.folder.write(also, b"{}")
    assert find_unborn(root, NO_GRACE) == Findings([], [])


def test_a_young_attempt_is_protected_with_all_it_wrote(local_store, tmp_path):
    local_store.create_run({})
    writer = local_store.begin("evaluation", 0, {}, DIGEST)
    writer.write_bytes("old", b"written two hours ago")
    (old,) = tmp_path.rglob("old")
    os.utime(old, (time.time() - 7200,) * 2)
    findings = find_removable(local_store)
    assert findings.removable == []
    assert "perhaps by a live writer" in findings.left_alone[0]
    for path in old.parent.iterdir():
        os.utime(path, (time.time() - 3700,) * 2)
    assert len(find_removable(local_store).removable) == 1


def test_a_writer_that_wakes_after_its_attempt_was_found_keeps_what_it_commits():
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    store.create_run({})
    writer = store.begin("evaluation", 0, {}, DIGEST)
    writer.write_bytes("scores.parquet", b"x")
    (found,) = find_removable(store, grace=NO_GRACE).removable
    ref = writer.commit()
    remove(root_of(store), found)
    assert store.verify(ref) == []


class DiedError(Exception):
    pass


def die_before_commit(writer, monkeypatch) -> None:
    """Have a writer write all but its last object."""

    def create(*_):
        raise DiedError

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "create", create)
        with pytest.raises(DiedError):
            writer.commit()


def test_a_resumed_run_may_commit_the_very_artifact_whose_leftovers_were_just_found(monkeypatch):
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    store.create_run({})
    dead = store.begin("training", 0, {}, DIGEST)
    dead.write_bytes("checkpoint/model", b"weights0")
    die_before_commit(dead, monkeypatch)
    found = find_removable(store, grace=NO_GRACE).removable
    resumed = store.begin("training", 0, {}, DIGEST)
    resumed.write_bytes("checkpoint/model", b"weights0")
    ref = resumed.commit()
    for removable in found:
        remove(root_of(store), removable)
    assert store.verify(ref) == []
    assert store.status(0)[STAGES.index("training")].seconds is not None
    assert sorted(path.rsplit("/", 1)[1] for path in listing(store) if "/" in path) == [
        "_committed.json",
        f"_objects-{ref.sha256}.json",
        "_timing.json",
        "model",
    ]


def write_small(writer, tmp_path) -> None:
    writer.write_bytes("metrics.json", b"{}")


def write_file(writer, tmp_path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    writer.take_file("checkpoint/model", tmp_path / "weights")


def write_arrays(writer, tmp_path) -> None:
    trace = make_trace(3)
    write_routes(writer, [(trace, digests_of([trace])[0])], origin_of())


@pytest.mark.parametrize("write", [write_small, write_file, write_arrays])
def test_a_writer_that_has_written_nothing_yet_loses_its_note_and_no_more(store, tmp_path, write):
    store.create_run({})
    writer = store.begin("routes", 0, {}, DIGEST)
    assert len(clean(store)) == 1
    write(writer, tmp_path)
    assert store.verify(writer.commit()) == []


@pytest.mark.parametrize(("document", "num_kept"), [({IMPORTS_KEY: {}}, 1), ({}, 3)])
def test_of_imports_the_newest_is_kept_and_of_a_run_all_that_training_may_need(store, document, num_kept):
    store.create_run(document)
    refs = [commit_routes(store, [make_trace(3)], iteration=iteration) for iteration in range(3)]
    clean(store, Retention(NO_GRACE, keep_iterations=1))
    assert [store.open(ref).expiry is None for ref in refs] == [False] * (3 - num_kept) + [True] * num_kept


def test_objects_around_a_damaged_commit_are_kept_for_its_repair(local_store, tmp_path):
    refs = commit_run(local_store, 3)
    (tmp_path / "run-1" / refs[0, "training"].uri / "_committed.json").write_bytes(b"damaged")
    before = listing(local_store)
    findings = find_removable(local_store, Retention(keep_iterations=1), NO_GRACE)
    assert findings.removable == []
    assert "damaged" in findings.left_alone[0]
    assert listing(local_store) == before


def test_objects_that_a_lost_placement_no_longer_points_to_are_kept():
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    refs = commit_run(store, 3)
    ref = refs[0, "training"]
    placement = store.open(ref).placement
    store.folder.remove(f"{ref.uri}/{placement_file(ref.sha256)}")
    assert store.verify(ref) != []
    assert clean(store) == []
    placement.write(store.folder / ref.uri, ref.sha256)
    assert store.verify(ref) == []


def test_foreign_files_and_folders_are_not_looked_at(local_store, tmp_path):
    commit_run(local_store, 3)
    for name in ("run-1/notes.txt", "run-1/iterations/plots/a.png", "run-1/iterations/00000/notes/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert clean(local_store) == []


def test_dead_probes_of_the_root_are_found(store):
    root = Storage.at(root_of(store))
    root.write(f"_probe-{'a' * 32}", b"moe-replay\n")
    root.write("_probe-of-mine", b"")
    assert find_probes(root_of(store)).removable == []
    (probe,) = find_probes(root_of(store), NO_GRACE).removable
    remove(root_of(store), probe)
    assert list(root.files()) == ["_probe-of-mine"]


def test_runs_are_told_by_their_document(store):
    commit_run(store, 1)
    RunStore(root_of(store), "no-run").folder.write("iterations/00000/x", b"")
    assert runs_under(root_of(store)) == ["run-1"]


def leave_claim(store, age: timedelta) -> None:
    """What a runner that was killed leaves, a heartbeat half written included."""
    for name in ("claim", "json"):
        store.folder.write(f"_lease/{'0' * 32}.{name}", b"{}")
    store.folder.write(f"_lease/.{'0' * 32}.json.{'1' * 32}", b"{")
    if folder := store.folder.local_folder:
        for path in (folder / "_lease").iterdir():
            os.utime(path, (time.time() - age.total_seconds(),) * 2)


@pytest.mark.parametrize("born", [True, False])
def test_the_claim_of_a_runner_that_died_goes_and_keeps_no_folder_from_going(tmp_path, born):
    store = RunStore(str(tmp_path), "run-1")
    if born:
        commit_run(store, 3)
    before = set(listing(store))
    leave_claim(store, timedelta(minutes=1))
    if not born:
        store.begin("routes", 0, {}, DIGEST)
    found = find_removable(store, grace=NO_GRACE) if born else find_unborn(str(tmp_path), NO_GRACE)
    claims = [removable for removable in found.removable if removable.why == "claim of a runner that died"]
    assert [(claim.name, len(claim.paths)) for claim in claims] == [(f"run-1/_lease/{'0' * 32}", 3)]
    for removable in found.removable:
        remove(str(tmp_path), removable)
    assert set(listing(store)) == before
    assert (tmp_path / "run-1").exists() == born
    assert not (tmp_path / "run-1" / "_lease").exists()


@pytest.mark.parametrize("born", [True, False])
def test_a_runner_that_lives_keeps_its_claim_however_short_the_grace(store, root, born):
    if born:
        commit_run(store, 3)
    with holding(store.folder, print) as held:
        found = find_removable(store, grace=NO_GRACE) if born else find_unborn(root, NO_GRACE)
        assert found.removable == []
        assert found.left_alone[0].startswith("run-1/_lease/")
        held.renew()
        held.require()


def test_a_foreign_folder_with_claims_in_it_is_left_alone(tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    leave_claim(store, timedelta(days=1))
    store.folder.write("_lease/notes.txt", b"mine")
    assert find_unborn(str(tmp_path), NO_GRACE) == Findings([], [])
