"""Writers that end by SIGKILL, on a local disk: all of an artifact is visible afterwards, or nothing."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from archive_samples import DIGEST, commit_routes, make_trace
from sudden_death import die_before_change

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.removal import remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.routes import verify_routes

TRACES = [make_trace(9)]
KEEP_ONE = Retention(keep_iterations=1)

# One process imports, and has a child die before each change that a writer makes to the file system. Compressed by C
# code, which no child has to compile or load.
DYING_WRITERS = """
import os, signal, sys
from pathlib import Path
sys.path += sys.argv[2:]
from archive_samples import commit_routes, make_trace
from sudden_death import die_before_change
from moe_replay.archive.artifacts import RunStore

change, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    child = os.fork()
    if child == 0:
        root = str(Path(sys.argv[1]) / str(change))
        store = RunStore(root, "run-1")
        store.create_run({})
        die_before_change(root, change)
        commit_routes(store, [make_trace(9)], chunk_tokens=4, codec="zstd")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    change += 1
sys.exit(status)
"""

WRITER_OF_MUCH = """
import sys
from moe_replay.archive.artifacts import RunStore
writer = RunStore(sys.argv[1], "run-1").begin("training", 0, {}, "d")
print("began", flush=True)
for n in range(40):
    writer.write_bytes(f"checkpoint/{n}", bytes([n]) * 2_000_000)
writer.commit()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> list[Path]:
    """Roots of runs whose writer of routes was killed before its first, second, ... change; the last was not."""
    root = tmp_path_factory.mktemp("killed")
    samples = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    subprocess.run([sys.executable, "-c", DYING_WRITERS, str(root), *samples], check=True)
    return sorted(root.iterdir(), key=lambda path: int(path.name))


def files_of(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def test_a_writer_killed_before_any_change_leaves_the_whole_archive_or_nothing(killed):
    found = [RunStore(str(root), "run-1").commit_of("routes", 0) for root in killed]
    assert len(found) > 30
    # The commit is one change: the last, of a whole folder.
    assert [ref is not None for ref in found] == [False] * (len(found) - 1) + [True]
    assert all(
        RunStore(str(root), "run-1").find("routes", 0, {}, DIGEST) == ref
        for root, ref in zip(killed, found, strict=True)
    )


def test_after_any_kill_the_next_writer_commits_the_same_and_cleaning_removes_the_rest(killed):
    refs = set()
    for root in (*killed[::3], killed[-1]):
        store = RunStore(str(root), "run-1")
        ref = store.commit_of("routes", 0) or commit_routes(store, TRACES, chunk_tokens=4, codec="zstd")
        refs.add(ref)
        artifact = store.open(ref)
        assert verify_routes(artifact) == []
        for removable in find_removable(store, grace=timedelta(0)).removable:
            remove(str(root), removable)
        committed = {f"{ref.uri}/{stored.path}" for stored in artifact.commit.objects}
        own = {f"{ref.uri}/_committed.json", f"{ref.uri}/_timing.json", "run.json"}
        assert files_of(root / "run-1") == committed | own
        assert verify_routes(artifact) == []
    assert len(refs) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_killed_at_a_random_time_leaves_the_whole_artifact_or_nothing(tmp_path, seed):
    process = subprocess.Popen([sys.executable, "-c", WRITER_OF_MUCH, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    # Writing takes about this long, most of it in the middle of an object.
    time.sleep(random.Random(seed).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = RunStore(str(tmp_path), "run-1")
    ref = store.find("training", 0, {}, "d")
    assert ref is None or store.verify(ref) == []
    if ref is None:
        writer = store.begin("training", 0, {}, "d")
        writer.write_bytes("checkpoint/0", b"again")
        assert store.verify(writer.commit()) == []


def test_an_object_half_written_is_no_object(tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    child = os.fork()
    if child == 0:
        # All is written by then, under a name of its own; only the rename is missing.
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        store.folder.write("run.json", b"{}")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not store.exists()
    assert len(files_of(tmp_path / "run-1")) == 1
    store.create_run({})
    (partial,) = find_removable(store, grace=timedelta(0)).removable
    remove(str(tmp_path), partial)
    assert files_of(tmp_path / "run-1") == {"run.json"}


def test_a_cleaning_killed_before_any_change_leaves_a_readable_run_and_the_next_one_finishes(tmp_path):
    store = RunStore(str(tmp_path / "made"), "run-1")
    store.create_run({})
    refs = [commit_training(store, iteration) for iteration in range(2)]
    store.begin("evaluation", 1, {}, DIGEST).write_bytes("scores.parquet", b"half")
    change, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        root = tmp_path / str(change)
        shutil.copytree(tmp_path / "made", root)
        status = clean_in_a_child(root, change)
        store = RunStore(str(root), "run-1")
        assert [store.find("training", n, {}, DIGEST) for n in range(2)] == refs
        assert [store.verify(ref) for ref in refs] == [[], []]
        clean(root)
        assert find_removable(store, KEEP_ONE, timedelta(0)).removable == []
        assert store.open(refs[0]).kept == []
        assert len(files_of(root / "run-1")) == 8
        change += 1
    assert status == 0
    assert change > 8


def commit_training(store, iteration):
    writer = store.begin("training", iteration, {}, DIGEST)
    writer.write_bytes("checkpoint/model", b"weights")
    writer.write_bytes("metrics.json", b"{}")
    return writer.commit()


def clean(root: Path) -> None:
    for removable in find_removable(RunStore(str(root), "run-1"), KEEP_ONE, timedelta(0)).removable:
        remove(str(root), removable)


def clean_in_a_child(root: Path, change: int) -> int:
    """Clean in a process that dies before its change of that number; returns how it ended."""
    child = os.fork()
    if child == 0:
        die_before_change(str(root), change)
        clean(root)
        os._exit(0)
    return os.waitpid(child, 0)[1]
