"""Artifacts: committed once and whole, found by what they were made from, refused when they are not as committed."""

import hashlib
import json
import os
from pathlib import Path

import fsspec
import pytest
from archive_samples import commit_scores

from moe_replay.archive.artifacts import ArtifactRef, Commit, RunStore
from moe_replay.archive.storage import Storage
from moe_replay.errors import ArchiveCorrupt, ConfigError

REF = ArtifactRef(uri="iterations/00000/rollout", sha256="a" * 64)


def test_what_is_committed_is_read_back(store):
    ref = commit_scores(store, metrics={"reward/mean": 1}, attributes={"names": ["a", 1, None], "flag": True})
    artifact = store.open(ref)
    assert artifact.read_bytes("parts/summary.json") == b"{}"
    assert artifact.commit.metrics == {"reward/mean": 1.0}
    assert artifact.commit.attributes == {"names": ["a", 1, None], "flag": True}
    assert ref.uri == "iterations/00000/evaluation"


def test_nothing_is_visible_before_the_commit(store):
    writer = store.begin("rollout", 0, {}, "d")
    writer.write_bytes("part-0.parquet", b"rows")
    assert store.commit_of("rollout", 0) is None
    assert store.find("rollout", 0, {}, "d") is None


def test_what_an_uncommitted_attempt_left_is_no_part_of_the_artifact(store):
    store.begin("evaluation", 0, {}, "d").write_bytes("leftover", b"x")
    artifact = store.open(commit_scores(store))
    assert [stored.path for stored in artifact.commit.objects] == ["parts/summary.json", "scores.parquet"]
    assert "leftover" not in (Storage.at(store.name) / "iterations/00000/evaluation").sizes()
    with pytest.raises(ArchiveCorrupt, match="no object 'leftover'"):
        artifact.read_bytes("leftover")


def test_a_committed_stage_is_found_by_its_inputs_and_config(store):
    ref = commit_scores(store, inputs={"rollout": REF})
    assert store.find("evaluation", 0, {"rollout": REF}, "d") == ref


def test_a_commit_of_another_config_is_an_error_that_says_so(store):
    commit_scores(store, digest="old")
    with pytest.raises(ConfigError, match="config digest old, this run has new"):
        store.find("evaluation", 0, {}, "new")


def test_a_commit_of_other_inputs_is_an_error_that_names_them(store):
    commit_scores(store, inputs={"rollout": REF, "model": REF})
    other = ArtifactRef(uri=REF.uri, sha256="b" * 64)
    with pytest.raises(ConfigError, match="other inputs: rollout differ"):
        store.find("evaluation", 0, {"rollout": other, "model": REF}, "d")


def test_a_committed_stage_is_not_written_again(store):
    commit_scores(store)
    with pytest.raises(ConfigError, match="is committed"):
        store.begin("evaluation", 0, {}, "d")


def test_a_writer_whose_stage_another_committed_is_refused(store):
    first = store.begin("evaluation", 0, {}, "d")
    first.write_bytes("scores.parquet", b"first")
    ref = commit_scores(store, data=b"other")
    with pytest.raises(ConfigError, match="one runner at a time"):
        first.commit()
    assert store.open(ref).read_bytes("scores.parquet") == b"other"


def test_of_two_writers_the_first_to_commit_wins(store):
    first, second = store.begin("evaluation", 0, {}, "d"), store.begin("evaluation", 0, {}, "d")
    second.write_bytes("scores.parquet", b"second")
    first.write_bytes("scores.parquet", b"first")
    ref = first.commit()
    with pytest.raises(ConfigError, match="one runner at a time"):
        second.commit()
    assert store.open(ref).read_bytes("scores.parquet") == b"first"


def test_what_a_writer_writes_after_another_committed_harms_nothing(store):
    late = store.begin("evaluation", 0, {}, "d")
    ref = commit_scores(store)
    late.write_bytes("scores.parquet", b"from a paused machine")
    assert store.verify(ref) == []


def test_a_commit_object_is_never_overwritten(store):
    writer = store.begin("evaluation", 0, {}, "d")
    folder = Storage.at(store.name) / "iterations/00000/evaluation"
    folder.create("_committed.json", b"another writer's")
    with pytest.raises(ConfigError, match="one runner at a time"):
        writer.commit()
    with pytest.raises(FileExistsError):
        folder.create("_committed.json", b"")
    assert folder.read("_committed.json") == b"another writer's"


def test_a_writer_whose_objects_were_cleaned_away_commits_nothing(store):
    writer = store.begin("evaluation", 0, {}, "d")
    writer.write_bytes("scores.parquet", b"x")
    for path in (Storage.at(store.name) / "iterations").sizes():
        (Storage.at(store.name) / "iterations").remove(path)
    with pytest.raises(ConfigError, match=r"1 of 1 objects .*scores\.parquet"):
        writer.commit()
    assert store.commit_of("evaluation", 0) is None


def test_a_folder_that_an_artifact_could_not_be_moved_to_is_refused_before_any_work(local_store, tmp_path):
    ref = commit_scores(local_store)
    (tmp_path / "run-1" / ref.uri / "_committed.json").unlink()
    with pytest.raises(ConfigError, match="delete the folder"):
        local_store.begin("evaluation", 0, {}, "d")


def test_a_local_artifact_lies_whole_in_its_stages_folder(local_store, tmp_path):
    commit_scores(local_store)
    (stage,) = (tmp_path / "run-1/iterations/00000").iterdir()
    files = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
    assert files == {"_committed.json", "_timing.json", "parts/summary.json", "scores.parquet"}


def test_commit_bytes_depend_on_nothing_but_the_content(tmp_path):
    refs = [
        commit_scores(RunStore(root, "run-1"), inputs={"rollout": REF}, metrics={"b": 2, "a": 0.1})
        for root in (str(tmp_path / "one"), "memory://two")
    ]
    assert refs[0] == refs[1]


@pytest.mark.parametrize("metrics", [{"time/rollout": 1.0}, {"loss": float("nan")}, {"loss": float("inf")}])
def test_metrics_that_a_seed_does_not_reproduce_are_refused(local_store, metrics):
    with pytest.raises(ValueError, match="metric"):
        commit_scores(local_store, metrics=metrics)


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete"])
@pytest.mark.parametrize("name", ["scores.parquet", "parts/summary.json", "_committed.json"])
def test_every_damaged_object_is_named(local_store, tmp_path, damage, name):
    ref = commit_scores(local_store)
    path = tmp_path / "run-1" / ref.uri / name
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(
            {"flip": bytes([data[0] ^ 1]) + data[1:], "truncate": data[:-1], "extend": data + b" "}[damage]
        )
    (problem,) = local_store.verify(ref)
    assert name in problem
    with pytest.raises((ArchiveCorrupt, ConfigError)):
        local_store.open(ref).localize(tmp_path)


def test_swapped_objects_are_found(local_store, tmp_path):
    writer = local_store.begin("evaluation", 0, {}, "d")
    writer.write_bytes("a", b"1")
    writer.write_bytes("b", b"2")
    ref = writer.commit()
    folder = tmp_path / "run-1" / ref.uri
    (folder / "a").write_bytes(b"2")
    (folder / "b").write_bytes(b"1")
    assert len(local_store.verify(ref)) == 2
    with pytest.raises(ArchiveCorrupt, match=r"object .*/a was altered: expected sha256 .*, found"):
        local_store.open(ref).read_bytes("a")
    with pytest.raises(ArchiveCorrupt, match="altered"):
        local_store.open(ref).localize(tmp_path)


def test_a_commit_with_a_missing_or_truncated_object_is_not_found_silently(local_store, tmp_path):
    ref = commit_scores(local_store)
    stored = local_store.open(ref).commit.objects[0]
    path = tmp_path / "run-1" / ref.uri / stored.path
    for damage in (path.read_bytes()[:-1], None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(ArchiveCorrupt, match=stored.path):
            local_store.find("evaluation", 0, {}, "d")


def test_every_flipped_byte_of_a_commit_is_found_without_a_reference(local_store, tmp_path):
    path = tmp_path / "run-1" / commit_scores(local_store, metrics={"a": 1.5}).uri / "_committed.json"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ArchiveCorrupt, match=r"_committed\.json"):
            local_store.commit_of("evaluation", 0)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"folder": "../other"}', b'{"folder": "rollout"}', b'{"new": 1}'])
def test_a_placement_that_leads_elsewhere_is_refused(store, data):
    ref = commit_scores(store)
    store.folder.write(f"{ref.uri}/_objects-{ref.sha256}.json", data)
    with pytest.raises(ArchiveCorrupt, match="nothing readable of where"):
        store.open(ref)


def test_a_placement_of_another_attempt_gives_no_wrong_bytes():
    store = RunStore("memory://misplaced", "run-1")
    ref, other = commit_scores(store), commit_scores(store, iteration=1, data=b"others")
    folder = store.open(other).placement.folder
    for path, data in (("scores.parquet", b"SCORES"), ("parts/summary.json", b"{}")):
        store.folder.write(f"iterations/00000/{folder}/{path}", data)
    store.open(other).placement.write(store.folder / ref.uri, ref.sha256)
    with pytest.raises(ArchiveCorrupt, match=r"scores\.parquet was altered"):
        store.open(ref).read_bytes("scores.parquet")


def test_a_commit_moved_from_another_iteration_is_refused(local_store, tmp_path):
    ref = commit_scores(local_store, iteration=1)
    os.rename(tmp_path / "run-1/iterations/00001", tmp_path / "run-1/iterations/00002")
    with pytest.raises(ArchiveCorrupt, match="belongs elsewhere"):
        local_store.commit_of("evaluation", 2)
    with pytest.raises(ArchiveCorrupt, match="belongs elsewhere"):
        local_store.open(ArtifactRef(uri="iterations/00002/evaluation", sha256=ref.sha256))


def forge(body, **changes):
    body = {**json.loads(body)["commit"], **changes}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    document = {"commit": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../secret",
        "a/../../b",
        "a\\b",
        "",
        "a//b",
        "./a",
        "C:/x",
        "file:///x",
        "a\x00",
        "_committed.json",
    ],
)
def test_a_manifest_that_leaves_its_folder_is_refused(local_store, tmp_path, path):
    ref = commit_scores(local_store)
    target = tmp_path / "run-1" / ref.uri / "_committed.json"
    target.write_bytes(forge(target.read_bytes(), objects=[{"path": path, "size": 1, "sha256": "a" * 64}]))
    with pytest.raises(ArchiveCorrupt, match="breaks the format"):
        local_store.commit_of("evaluation", 0)


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"extra": 1}, {"metrics": {"a": None}}, {"run_id": "../x"}])
def test_a_commit_of_another_format_is_refused(local_store, tmp_path, changes):
    target = tmp_path / "run-1" / commit_scores(local_store).uri / "_committed.json"
    target.write_bytes(forge(target.read_bytes(), **changes))
    with pytest.raises(ArchiveCorrupt, match="format"):
        local_store.commit_of("evaluation", 0)


@pytest.mark.parametrize("path", ["/abs", "../up", "_committed.json", "_timing.json", f"_objects-{'a' * 64}.json", ""])
def test_a_writer_refuses_paths_outside_its_folder(local_store, path):
    with pytest.raises(ValueError, match="object path"):
        local_store.begin("rollout", 0, {}, "d").write_bytes(path, b"")


@pytest.mark.parametrize("uri", ["/abs/path", "../other-run/iterations/00000/rollout", "a\\b", ""])
def test_a_reference_outside_the_run_must_be_a_url(uri):
    with pytest.raises(ValueError, match="uri"):
        ArtifactRef(uri=uri, sha256="a" * 64)


def test_an_artifact_outside_the_run_opens_by_url(local_store, root):
    other = RunStore(root, "teacher")
    ref = commit_scores(other)
    outside = ArtifactRef(uri=f"{other.name}/{ref.uri}", sha256=ref.sha256)
    assert local_store.open(outside).read_bytes("scores.parquet") == b"scores"


def test_files_are_taken_and_localized(store, tmp_path):
    source, data = tmp_path / "model.safetensors", os.urandom(100_000)
    source.write_bytes(data)
    writer = store.begin("training", 0, {}, "d")
    writer.take_file("checkpoint/model.safetensors", source)
    artifact = store.open(writer.commit())
    folder = artifact.localize(tmp_path / "cache")
    assert (folder / "checkpoint/model.safetensors").read_bytes() == data
    assert artifact.localize(tmp_path / "cache") == folder


def test_a_taken_file_is_moved_on_one_file_system_and_copied_to_another(tmp_path):
    on_disk, in_memory = RunStore(str(tmp_path / "root"), "run-1"), RunStore("memory://taken", "run-1")
    for store, stays in ((on_disk, False), (in_memory, True)):
        source = tmp_path / "weights"
        source.write_bytes(b"weights")
        writer = store.begin("training", 0, {}, "d")
        writer.take_file("checkpoint/weights", source)
        assert source.exists() == stays
        assert store.open(writer.commit()).read_bytes("checkpoint/weights") == b"weights"


def test_a_taken_file_can_be_read_by_whoever_reads_the_others(tmp_path):
    source, store = tmp_path / "weights", RunStore(str(tmp_path / "root"), "run-1")
    source.write_bytes(b"weights")
    source.chmod(0o600)  # as safetensors writes
    writer = store.begin("training", 0, {}, "d")
    writer.write_bytes("metrics.json", b"{}")
    writer.take_file("weights", source)
    folder = tmp_path / "root/run-1" / writer.commit().uri
    assert (folder / "weights").stat().st_mode == (folder / "metrics.json").stat().st_mode


def test_a_part_of_an_artifact_is_localized_without_the_rest(tmp_path):
    store = RunStore("memory://parts", "run-1")
    artifact = store.open(commit_scores(store))
    part = artifact.localize(tmp_path, "parts")
    assert [path.name for path in part.rglob("*") if path.is_file()] == ["summary.json"]
    assert (artifact.localize(tmp_path) / "scores.parquet").read_bytes() == b"scores"


def test_a_part_that_an_artifact_lacks_is_refused(store, tmp_path):
    with pytest.raises(ArchiveCorrupt, match="no object below 'checkpoint'"):
        store.open(commit_scores(store)).localize(tmp_path, "checkpoint")


def test_a_local_artifact_is_localized_in_place(local_store, tmp_path):
    ref = commit_scores(local_store)
    assert local_store.open(ref).localize(tmp_path / "cache") == tmp_path / "run-1" / ref.uri
    assert not (tmp_path / "cache").exists()


def test_a_damaged_copy_in_the_cache_is_downloaded_again(tmp_path):
    artifact = RunStore("memory://cached", "run-1")
    opened = artifact.open(commit_scores(artifact))
    folder = opened.localize(tmp_path)
    (folder / "scores.parquet").write_bytes(b"SCORES")
    assert (opened.localize(tmp_path) / "scores.parquet").read_bytes() == b"scores"


def test_a_damaged_remote_artifact_leaves_no_copy(tmp_path):
    store = RunStore("memory://damaged", "run-1")
    ref = commit_scores(store)
    (stored,) = fsspec.filesystem("memory").glob("/damaged/run-1/iterations/00000/*/scores.parquet")
    fsspec.filesystem("memory").pipe_file(stored, b"SCORES")
    with pytest.raises(ArchiveCorrupt, match=r"scores\.parquet was altered"):
        store.open(ref).localize(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_commit_parses_to_the_same_bytes(local_store, tmp_path):
    data = Path(tmp_path / "run-1" / commit_scores(local_store).uri / "_committed.json").read_bytes()
    assert Commit.from_bytes(data, "x").to_bytes() == data
