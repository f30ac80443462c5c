"""Which methods' routes can be told on a stored rollout. Asked before an engine is started, so it imports none."""

from collections.abc import Sequence

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.evolution import has_evolution
from moe_replay.errors import ConfigError
from moe_replay.methods import Method


def is_predicted(rollout: Artifact) -> bool:
    """Whether a rollout was served under a predictor, so that the routes captured are PR2's and not R3's.

    One that steers no layer moves no route, and only one that steers has a fidelity to tell.
    """
    return "predictor/merge_fidelity" in rollout.commit.metrics


def require_replayable(store: RunStore, iteration: int, methods: Sequence[Method]) -> Artifact:
    """The iteration's rollout, if the routes of these methods can be told on it.

    Raises ConfigError when it or its routes are not committed, a method replays no routes or predicts before anything
    could be fitted, or R3's routes are asked of a rollout that was predicted.
    """
    rollout, _ = (committed(store, stage, iteration) for stage in ("rollout", "routes"))
    for method in methods:
        if method.route_source == "none":
            raise ConfigError(f"{method.label} replays no routes, so there is nothing to try; name r2, r3 or pr2")
        if method.predictor and iteration == 0:
            raise ConfigError(
                f"{method.label} predicts nothing in iteration 0, before any router has moved; name a later one"
            )
        if method.route_source == "rollout" and not method.predictor and is_predicted(rollout):
            raise ConfigError(
                f"{method.label} replays the routes of a rollout that was not predicted, and that of iteration "
                f"{iteration} of run {store.run_id} was served under a predictor; take an earlier one, or a run of r3 "
                "with evolution.record = true"
            )
    return rollout


def tellable_methods(store: RunStore, iteration: int) -> list[str]:
    """The presets whose routes can be told on an iteration's rollout; raises ConfigError when there is none."""
    if is_predicted(committed(store, "rollout", iteration)):
        return ["r2", "pr2"]
    before = store.committed("training", iteration - 1) if iteration else None
    return ["r2", "r3", *(["pr2"] if before is not None and has_evolution(before) else [])]


def committed(store: RunStore, stage: str, iteration: int) -> Artifact:
    """What a stage committed; raises ConfigError when it didn't."""
    artifact = store.committed(stage, iteration)
    if artifact is None:
        raise ConfigError(
            f"run {store.run_id} has no {stage} of iteration {iteration}; see moe-replay status {store.run_id}"
        )
    return artifact
