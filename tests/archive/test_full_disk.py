"""Disks that are really full: what is committed stays, and what was not is made once there is room."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archive_samples import DIGEST, commit_routes, make_trace, origin_of
from full_disk import enlarge, small_disk
from safetensors.numpy import save_file

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.routes import verify_routes
from moe_replay.archive.storage_errors import told_of_full_disk
from moe_replay.errors import StorageFull

SIZE, MUCH = 2**20, b"x" * 2**20


def commit_bytes(store: RunStore, _: Path) -> ArtifactRef:
    writer = store.begin("training", 1, {}, DIGEST)
    writer.write_bytes("metrics.json", b"{}")
    writer.write_bytes("log_probs", MUCH)
    return writer.commit()


def commit_file(store: RunStore, elsewhere: Path) -> ArtifactRef:
    (elsewhere / "weights").write_bytes(MUCH)
    writer = store.begin("training", 1, {}, DIGEST)
    writer.take_file("checkpoint/weights", elsewhere / "weights")
    return writer.commit()


def commit_much_routing(store: RunStore, _: Path) -> ArtifactRef:
    traces = [make_trace(60_000, num_experts=64, top_k=16, seed=1)]
    return commit_routes(store, traces, origin_of(64, 16), iteration=1, codec="zstd")


@pytest.mark.parametrize("commit", [commit_bytes, commit_file, commit_much_routing])
def test_what_is_committed_outlives_a_full_disk_and_the_stage_is_made_when_there_is_room(
    commit: Callable[[RunStore, Path], ArtifactRef], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", SIZE) as disk:
        store = RunStore(str(disk), "run-1")
        before = commit_routes(store, [make_trace(9)], chunk_tokens=4, codec="zstd")
        wanted = r"disk/run-1/.* \([\d,]+ bytes\) failed \(.*No space left.*resume the run"

        with pytest.raises(StorageFull, match=wanted) as told:
            commit(store, tmp_path)

        assert not told.value.transient
        assert {status.state for status in store.status(1)} == {"missing"}
        assert verify_routes(store.open(before)) == []
        enlarge(disk, 16 * SIZE)
        assert store.verify(commit(store, tmp_path)) == []


def test_a_library_that_finds_no_room_for_its_file_is_understood(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", SIZE) as disk,
        pytest.raises(StorageFull, match=f"below {disk} failed .*resume the run"),
        told_of_full_disk(str(disk)),
    ):
        save_file({"weight": np.ones(SIZE, "float32")}, disk / "model.safetensors")
