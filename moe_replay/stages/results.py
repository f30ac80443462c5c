"""What a run achieved, read from its committed artifacts alone."""

from moe_replay.archive.artifacts import RunStore


def iteration_metrics(store: RunStore, iteration: int) -> dict[str, float]:
    """All metrics of an iteration's committed stages, under the keys of `docs/methods.md`.

    Adds what commits leave out because the clock decides it: `time/<stage>` in seconds and `archive/write_mb_s`.
    """
    metrics: dict[str, float] = {}
    for status in store.status(iteration):
        ref = store.commit_of(status.stage, iteration)
        if ref is None:
            continue
        commit = store.open(ref).commit
        metrics |= commit.metrics
        if status.seconds is not None:
            metrics[f"time/{status.stage}"] = status.seconds
        if status.stage == "routes":
            tokens = commit.attributes["tokens"]
            assert isinstance(tokens, int)
            metrics["archive/bytes_per_token"] = status.bytes / max(tokens, 1)
            if status.seconds:
                metrics["archive/write_mb_s"] = status.bytes / status.seconds / 1e6
    return metrics
