"""What a run achieved, read from its committed artifacts alone."""

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.layout import STAGES, TIMING_FILE
from moe_replay.archive.writing import timing_of


def iteration_metrics(store: RunStore, iteration: int) -> dict[str, float]:
    """All metrics of an iteration's committed stages, under the keys of `docs/methods.md`.

    Adds what commits leave out because the clock decides it: `time/<stage>` in seconds and `archive/write_mb_s`.
    """
    metrics: dict[str, float] = {}
    for stage in STAGES:
        artifact = store.committed(stage, iteration)
        if artifact is not None:
            metrics |= stage_metrics(store, artifact)
    return metrics


def stage_metrics(store: RunStore, artifact: Artifact) -> dict[str, float]:
    """The part of `iteration_metrics` that one stage's artifact tells; only its timing is read."""
    commit = artifact.commit
    metrics = dict(commit.metrics)
    try:
        seconds, _ = timing_of((store.folder / artifact.ref.uri).read(TIMING_FILE))
    except FileNotFoundError:
        seconds = None
    if seconds is not None:
        metrics[f"time/{commit.stage}"] = seconds
    if commit.stage == "routes":
        tokens = commit.attributes["tokens"]
        assert isinstance(tokens, int)
        metrics["archive/bytes_per_token"] = commit.num_bytes / max(tokens, 1)
        if seconds:
            metrics["archive/write_mb_s"] = commit.num_bytes / seconds / 1e6
    return metrics
