"""Forking a run: another goes on from what it committed before an iteration, under settings that may differ."""

from collections.abc import Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

from moe_replay.archive.artifacts import Artifact, ArtifactRef, RunStore
from moe_replay.config import RunConfig
from moe_replay.config_reading import document_with, parse_config
from moe_replay.dotted import dotted
from moe_replay.engines.process import Progress
from moe_replay.errors import ConfigError
from moe_replay.places import run_root
from moe_replay.plan import ForkPoint, RunPlan
from moe_replay.preparation import prepare
from moe_replay.settings import NONE
from moe_replay.stages.decisions import is_skipped
from moe_replay.stages.run import Run


class LeftBehind(NamedTuple):
    """Work of partial rollouts that a fork does not go on with."""

    prompts: int
    """Those that the rollout before the fork left unfinished, or finished and not trained on."""
    changed: tuple[str, ...]
    """The keys because of which, dotted."""


def fork_run(source: RunStore, root: str, iteration: int, config: RunConfig, run_id: str, progress: Progress) -> Run:
    """Create the run `run_id`, which starts at `iteration` from what the source, under `root`, committed before.

    Nothing is copied: the new run refers to the source's artifacts. Problems, prompts and seeds are drawn by iteration,
    so that the new run goes on in the data where the source would have.

    Raises:
        ConfigError: the source has nothing to start from there, retention removed it, the run exists, or the config
            can't be trained from it; or as `preflight`.
        ArchiveCorrupt: what it would start from is not as committed.
    """
    if RunStore(run_root(config), run_id).exists():
        raise ConfigError(f"run {run_id} exists; fork under a name that is free (--as), or resume it")
    point = fork_point(source, root, iteration, config)
    if config.iterations <= iteration:
        raise ConfigError(
            f"iterations = {config.iterations} leaves nothing to do from iteration {iteration} on; give at least "
            f"--set iterations={iteration + 1}"
        )
    return prepare(config, run_id, progress, forked_from=point)


def forked_config(source: RunStore, overrides: Mapping[str, Any]) -> RunConfig:
    """The source's config with dotted overrides laid over it.

    Raises ConfigError as `load_config`, and where they take away the adapters that the source trains.
    """
    stored = RunPlan.stored(source).config
    document = document_with(overrides, stored.model_dump(mode="json"))
    training = document["training"]
    lora = training.get("lora") if isinstance(training, dict) else None
    rank = lora.get("rank") if isinstance(lora, dict) else lora
    if stored.training.lora.rank and rank in (0, NONE):
        # As a config by itself it may be refused too, but for keys that say how adapters are trained.
        raise _other_adapters(source, [f"training.lora.rank ({stored.training.lora.rank} -> 0)"])
    return parse_config(document)


def left_behind(source: RunStore, config: RunConfig) -> LeftBehind | None:
    """What a fork of the source under `config` leaves behind of its partial rollouts; none where it goes on with all.

    Raises as `RunPlan.stored`.
    """
    theirs = RunPlan.stored(source).config
    before, after = _sampling(theirs), _sampling(config)
    if theirs.rollout.partial_response_tokens is None or before == after:
        return None
    # A partial rollout has as many prompts at work beyond its batch, whatever the lengths of responses.
    return LeftBehind(theirs.rollout.oversampled_prompts, tuple(key for key in before if before[key] != after[key]))


def fork_point(source: RunStore, root: str, iteration: int, config: RunConfig) -> ForkPoint:
    """What a run under `config` would go on from; raises as `fork_run`."""
    plan = RunPlan.stored(source)
    _require_same_engine(source, plan, config)
    _require_same_adapters(source, plan, config)
    _require_trained(source, plan, iteration)
    policy = source.committed("training", iteration - 1)
    assert policy is not None
    _require_there(policy)
    predictor = None
    if config.method.predictor and plan.config.method.predictor:
        predictor = source.committed("predictor", iteration - 1)
        if predictor is None and not is_skipped(policy):
            raise ConfigError(
                f"run {source.run_id} has trained iteration {iteration - 1} and not fitted its predictor yet; resume "
                "it first, or take an earlier iteration"
            )
        if predictor is not None:
            _require_there(predictor)
    return ForkPoint(
        root=root,
        run_id=source.run_id,
        iteration=iteration,
        model_sha256=source.read_run()["model_sha256"],
        policy=_from_elsewhere(policy),
        predictor=predictor and _from_elsewhere(predictor),
        carried=_carried(source, plan, iteration, config),
        trainings=_trainings(source, plan, iteration, config),
        lineage=(source.run_id, *(plan.forked_from.lineage if plan.forked_from else ())),
    )


def _require_same_engine(source: RunStore, plan: RunPlan, config: RunConfig) -> None:
    """Refuse an engine that can't take the optimizer's state of the source's checkpoints."""
    theirs, ours = plan.config.training.engine, config.training.engine
    if theirs != ours:
        raise ConfigError(
            f"a fork goes on with its source's optimizer state, which is of training.engine = {theirs!r} in run "
            f"{source.run_id}, and this one asks for {ours!r}: leave training.engine as it is, or start a new run from "
            "the weights (--set model.path=.../checkpoint/huggingface)"
        )


def _require_same_adapters(source: RunStore, plan: RunPlan, config: RunConfig) -> None:
    """Refuse adapters that would not be those of the source's checkpoints, or not mean the same in the new run."""
    theirs, ours = (one.training.lora.model_dump(mode="json") for one in (plan.config, config))
    changed = [f"training.lora.{key} ({theirs[key]!r} -> {ours[key]!r})" for key in theirs if theirs[key] != ours[key]]
    if changed:
        raise _other_adapters(source, changed)


def _other_adapters(source: RunStore, changed: list[str]) -> ConfigError:
    return ConfigError(
        f"a fork trains on what its source trained, adapters or all weights, and this one changes "
        f"{', '.join(changed)} of run {source.run_id}: leave training.lora as it is, or start a new run from the "
        "weights, which each checkpoint holds merged (--set model.path=.../checkpoint/huggingface)"
    )


def _require_trained(source: RunStore, plan: RunPlan, iteration: int) -> None:
    """Refuse an iteration before which the source trained nothing itself."""
    first = plan.iterations.start
    trained = [n for n in source.iterations() if source.commit_of("training", n) is not None]
    if iteration - 1 in trained:
        return
    if iteration < 0:
        raise ConfigError(f"iterations count from 0, and a fork's first is 1 or more, not {iteration}")
    if iteration == 0:
        raise ConfigError("iteration 0 starts from the model itself, not from another run: moe-replay run does that")
    if plan.forked_from and iteration <= first:
        raise ConfigError(
            f"run {source.run_id} was forked itself, from run {plan.forked_from.run_id} at iteration {first}, and has "
            f"nothing before it; fork that one, or give an iteration above {first}"
        )
    may_be = f"give --iteration {trained[0] + 1} to {trained[-1] + 1}" if trained else "resume it first"
    raise ConfigError(
        f"run {source.run_id} has no training of iteration {iteration - 1} for iteration {iteration} to start from; it "
        f"has {f'those of {trained[0]} to {trained[-1]}' if trained else 'none'}: {may_be}"
    )


def _require_there(artifact: Artifact) -> None:
    if artifact.expiry is not None:
        raise ConfigError(
            f"objects of {artifact.name} were removed by retention on {artifact.expiry.on:%Y-%m-%d} "
            f"({artifact.expiry.why}), so no run can start from it; take a later iteration"
        )
    artifact.require_present()


def _carried(source: RunStore, plan: RunPlan, iteration: int, config: RunConfig) -> ArtifactRef | None:
    """The rollout whose unfinished responses the new run goes on with, if it samples as the source does."""
    if config.rollout.partial_response_tokens is None or _sampling(plan.config) != _sampling(config):
        return None
    rollout = source.committed("rollout", iteration - 1)
    assert rollout is not None
    if rollout.expiry is not None:
        raise ConfigError(
            f"objects of {rollout.name} were removed by retention on {rollout.expiry.on:%Y-%m-%d} "
            f"({rollout.expiry.why}), and with them the unfinished responses that this fork would go on with; take a "
            "later iteration, or leave them behind by another rollout.* than the source's (for example --set "
            f"rollout.oversampled_prompts={config.rollout.oversampled_prompts - 1 or 2})"
        )
    rollout.require_present()
    return _from_elsewhere(rollout)


def _sampling(config: RunConfig) -> dict[str, Any]:
    """What has to stay for unfinished responses to go on, dotted."""
    # Beside which training a batch is sampled is nothing to them.
    beside = {"rollout": {"one_step_off"}}
    return dotted(config.model_dump(mode="json", include={"seed", "data", "rollout"}, exclude=beside))


def _trainings(source: RunStore, plan: RunPlan, iteration: int, config: RunConfig) -> tuple[ArtifactRef, ...]:
    """What predictors of the new run are fitted from besides its own trainings."""
    if not (config.method.predictor and plan.config.records_evolution):
        return ()
    own = (source.committed("training", n) for n in range(iteration - 1, plan.iterations.start - 1, -1))
    before = plan.forked_from.trainings if plan.forked_from else ()
    refs = (_from_elsewhere(training) for training in own if training is not None)
    # Commits that no fit reaches are not read.
    return tuple(islice(chain(refs, before), config.predictor.window))


def _from_elsewhere(artifact: Artifact) -> ArtifactRef:
    """The artifact as a run under any root can name it."""
    return ArtifactRef(uri=artifact.name, sha256=artifact.ref.sha256)
