"""Runs to be cleaned, and what cleaning them does."""

from datetime import timedelta

from archive_samples import DIGEST

from moe_replay.archive.artifacts import ArtifactRef
from moe_replay.archive.removal import remove
from moe_replay.archive.retention import Retention, find_removable

NO_GRACE = timedelta(0)
KEEP_ALL = Retention()
STAGE_OBJECTS = {
    "rollout": {"part-00000.parquet": b"rows"},
    "routes": {"routes/zarr.json": b"{}", "routes/ids/c/0/0/0": b"ids"},
    "training": {"checkpoint/model": b"weights", "checkpoint/huggingface/config.json": b"{}", "metrics.json": b"{}"},
    "evaluation": {"scores.parquet": b"scores"},
}


def commit_stage(store, iteration, stage, inputs) -> ArtifactRef:
    writer = store.begin(stage, iteration, inputs, DIGEST)
    for path, data in STAGE_OBJECTS[stage].items():
        writer.write_bytes(path, data + str(iteration).encode())
    return writer.commit(metrics={f"{stage}/iteration": iteration})


def inputs_of(refs, iteration, stage):
    policy = {"policy": refs[iteration - 1, "training"]} if iteration else {}
    match stage:
        case "rollout":
            return policy
        case "routes":
            return {"rollout": refs[iteration, "rollout"]}
        case "training":
            return {**policy, "rollout": refs[iteration, "rollout"], "routes": refs[iteration, "routes"]}
        case _:
            return {"policy": refs[iteration, "training"]}


def commit_run(store, num_stages=16) -> dict[tuple[int, str], ArtifactRef]:
    """A run of which the first so many stages are committed, four an iteration."""
    store.create_run({"seed": 1})
    refs = {}
    for iteration, stage in [(n, stage) for n in range(9) for stage in STAGE_OBJECTS][:num_stages]:
        refs[iteration, stage] = commit_stage(store, iteration, stage, inputs_of(refs, iteration, stage))
    return refs


def root_of(store) -> str:
    return store.name.rsplit("/", 1)[0]


def clean(store, retention=KEEP_ALL, grace=NO_GRACE) -> list[str]:
    found = find_removable(store, retention, grace).removable
    for removable in found:
        remove(root_of(store), removable)
    return [removable.name for removable in found]


def listing(store):
    return store.folder.files()
