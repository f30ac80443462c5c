"""Which methods' routes can be told on a stored rollout. Asked before an engine is started, so it imports none."""

from collections.abc import Sequence

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.evolution import has_evolution
from moe_replay.errors import ConfigError
from moe_replay.methods import Method
from moe_replay.stages.carrying import read_about


def is_predicted(rollout: Artifact) -> bool:
    """Whether a rollout was served under a predictor, so that the routes captured are PR2's and not R3's.

    One that steers no layer moves no route, and only one that steers has a fidelity to tell. A partial rollout whose
    tokens were not all served under the same predictor counts as predicted: its log-probs are not the plain policy's.
    """
    return "predictor/merge_fidelity" in rollout.commit.metrics or len(versions_by_predictor(rollout)) > 1


def versions_by_predictor(rollout: Artifact) -> dict[str | None, list[int]]:
    """Weight versions of a partial rollout's tokens by the sha256 of the predictor that they were served under.

    None stands for no predictor. Empty for a rollout that is not partial; raises as `read_about`.
    """
    about = read_about(rollout)
    found: dict[str | None, list[int]] = {}
    for version, origin in sorted(about.origins.items()) if about else ():
        found.setdefault(origin.predictor_sha256, []).append(version)
    return found


def require_replayable(store: RunStore, iteration: int, methods: Sequence[Method]) -> Artifact:
    """The iteration's rollout, if the routes of these methods can be told on it.

    Raises ConfigError when it or its routes are not committed, a method replays no routes or predicts before anything
    could be fitted, R3's routes are asked of a rollout that was predicted, or R3's or PR2's of a partial one whose
    tokens were served under several predictors.
    """
    rollout, _ = (committed(store, stage, iteration) for stage in ("rollout", "routes"))
    versions, predicted = versions_by_predictor(rollout), is_predicted(rollout)
    for method in methods:
        if method.route_source == "none":
            raise ConfigError(f"{method.label} replays no routes, so there is nothing to try; name r2, r3 or pr2")
        if method.predictor and iteration == 0:
            raise ConfigError(
                f"{method.label} predicts nothing in iteration 0, before any router has moved; name a later one"
            )
        if method.route_source == "rollout" and len(versions) > 1:
            served = "; ".join(
                f"{numbers} under {f'that of sha256 {sha256[:12]}' if sha256 else 'none'}"
                for sha256, numbers in versions.items()
            )
            raise ConfigError(
                f"{method.label} replays routes that were all served with one predictor or all without, and tokens of "
                f"iteration {iteration} of run {store.run_id} were carried over {len(versions)} of these (weight "
                f"versions {served}); name r2, or take a run without rollout.partial_response_tokens"
            )
        if method.route_source == "rollout" and not method.predictor and predicted:
            raise ConfigError(
                f"{method.label} replays the routes of a rollout that was not predicted, and that of iteration "
                f"{iteration} of run {store.run_id} was served under a predictor; take an earlier one, or a run of r3 "
                "with evolution.record = true"
            )
    return rollout


def tellable_methods(store: RunStore, iteration: int) -> list[str]:
    """The presets whose routes can be told on an iteration's rollout; raises ConfigError when there is none."""
    rollout = committed(store, "rollout", iteration)
    if len(versions_by_predictor(rollout)) > 1:
        return ["r2"]
    if is_predicted(rollout):
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
