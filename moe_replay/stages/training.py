"""Replayed training: the mini-steps of one iteration under the method's routes. Runs in the training engine's process.

Shapes: N sequences of the rollout batch, S response tokens of the longest, T tokens of all sequences, L MoE layers,
K experts per token.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.routes import RouteArchive
from moe_replay.config import RunConfig
from moe_replay.engines.process import Progress
from moe_replay.engines.training import Pass, TokenSequence, TrainingEngine
from moe_replay.errors import ReplayError
from moe_replay.routing.metrics import (
    agreement_metrics,
    extreme_fraction,
    load_imbalance,
    policy_health,
    router_mismatch_metrics,
)
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.run import CHECKPOINT_FOLDER, Run
from moe_replay.stages.samples import Sample, read_samples

Metrics = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """A rollout batch with what the loss needs of it."""

    sequences: list[TokenSequence]
    captured: list[RoutingTrace]
    """Routes of the inference engine."""
    replayed: list[RoutingTrace] | None
    """Routes to replay in the mini-steps; none routes live."""
    mask_NS: Tensor
    advantages_NS: Tensor
    old: Pass
    """The old log-prob pass."""
    importance_NS: Tensor | None
    """Truncated importance weights."""


def train_replayed(
    engine: TrainingEngine,
    progress: Progress,
    run: Run,
    iteration: int,
    policy: ArtifactRef,
    rollout: ArtifactRef,
    routes: ArtifactRef,
) -> ArtifactRef:
    """Take the iteration's κ optimizer steps from `policy` and commit checkpoint and metrics.

    Raises:
        RoutingMismatch: the routes are not those of the rollout's tokens or of this model.
        ArchiveCorrupt: an input is not as committed.
    """
    inputs = {"policy": policy, "rollout": rollout, "routes": routes}
    writer = run.store().begin("training", iteration, inputs, run.digest("training"))
    torch.manual_seed(run.seed("training", iteration))
    if engine.weights != policy.sha256:
        with run.policy(policy, with_optimizer=True) as held:
            engine.load(held.folder, held.sha256, held.is_checkpoint)
    batch, metrics = _prepare(engine, run, list(read_samples(run.open(rollout))), RouteArchive.open(run.open(routes)))
    steps = [_mini_step(engine, run.config, batch, step, progress) for step in range(run.config.training.mini_steps)]
    metrics |= _summarize(steps)
    _require_finite(metrics)
    with run.scratch() as folder:
        engine.save(folder)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            writer.put_file(f"{CHECKPOINT_FOLDER}/{file.relative_to(folder).as_posix()}", file)
    writer.write_bytes("metrics.json", json.dumps({"mini_steps": steps}, sort_keys=True, indent=2).encode())
    ref = writer.commit(metrics=metrics, attributes={"method": run.config.method.label})
    engine.weights = ref.sha256
    return ref


def _prepare(engine: TrainingEngine, run: Run, samples: list[Sample], archive: RouteArchive) -> tuple[Batch, Metrics]:
    """The old log-prob pass, advantages and corrections; and what they show of mismatch."""
    method = run.config.method
    archive.require_tokens([sample.token_digest for sample in samples])
    captured = archive.read_sequences(0, archive.num_sequences)
    sequences = [
        TokenSequence(torch.tensor(sample.prompt_ids), torch.tensor(sample.response_ids)) for sample in samples
    ]
    mask_NS = pad_sequence([torch.ones(len(s.response_ids), dtype=torch.bool) for s in samples], batch_first=True)
    rollout_NS = pad_sequence([torch.tensor(sample.log_probs) for sample in samples], batch_first=True)
    routes = captured if method.route_source == "rollout" else None
    old = engine.score(sequences, routes, run.config.rollout.temperature)
    importance_NS, metrics = _mismatch(run.config, old.log_probs_NS, rollout_NS, mask_NS)
    replayed = captured if method.route_source == "rollout" else None
    if method.route_source == "old_log_prob":
        replayed = _split_live(old.live_TLK, captured)
    batch = Batch(sequences, captured, replayed, mask_NS, _advantages(samples, mask_NS), old, importance_NS)
    ids_TLK, valid_T = _join(captured)
    metrics |= _prefixed("mismatch", router_mismatch_metrics(ids_TLK[valid_T], old.live_TLK[valid_T].long()))
    metrics["routing/load_imbalance"] = load_imbalance(ids_TLK[valid_T], archive.provenance.num_experts)
    metrics["routing/missing_fraction"] = 1 - valid_T.float().mean().item()
    assert old.entropy_NS is not None
    metrics["policy/entropy"] = (old.entropy_NS[mask_NS]).mean().item()
    return batch, metrics


def _mini_step(engine: TrainingEngine, config: RunConfig, batch: Batch, step: int, progress: Progress) -> Metrics:
    """One optimizer step on the step-th part of the batch, measured before it changes the weights."""
    size = len(batch.sequences) // config.training.mini_steps
    part = slice(step * size, (step + 1) * size)
    seen = engine.step(
        batch.sequences[part],
        batch.replayed[part] if batch.replayed is not None else None,
        batch.old.log_probs_NS[part],
        batch.advantages_NS[part],
        batch.importance_NS[part] if batch.importance_NS is not None else None,
        config.method,
        config.rollout.temperature,
    )
    width = seen.log_probs_NS.shape[1]
    health = policy_health(
        seen.log_probs_NS,
        batch.old.log_probs_NS[part, :width],
        batch.advantages_NS[part, :width],
        batch.mask_NS[part, :width],
        (config.method.clip_low, config.method.clip_high),
        whole_sequences=config.method.policy_loss == "gspo",
    )
    # Without replay the reference is what served the token at rollout, as in PR2's comparison of GRPO.
    ids_TLK, valid_T = _join((batch.replayed or batch.captured)[part])
    progress(step + 1, config.training.mini_steps, "mini-steps")
    return {
        **_prefixed("policy", {**health, "loss": seen.loss, "grad_norm": seen.grad_norm}),
        **_prefixed("routing", agreement_metrics(ids_TLK[valid_T], seen.live_TLK[valid_T].long())),
    }


def _summarize(steps: list[Metrics]) -> Metrics:
    """The iteration's metrics from its mini-steps': means, the largest ratio, and the agreement of each step."""
    metrics = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
    metrics["policy/ratio_max"] = max(step["policy/ratio_max"] for step in steps)
    for number, step in enumerate(steps, start=1):
        metrics[f"routing/agreement_step_{number}"] = step["routing/agreement"]
    return metrics


def _require_finite(metrics: Metrics) -> None:
    """A policy that diverged is not committed, or every iteration after would start from it."""
    diverged = {key: value for key, value in metrics.items() if not np.isfinite(value)}
    if diverged:
        raise ReplayError(
            f"training diverged: {', '.join(f'{key} = {value}' for key, value in sorted(diverged.items()))}; "
            "nothing was committed: lower training.learning_rate, or replay routes (method r3), and start a new run"
        )


def _mismatch(config: RunConfig, old_NS: Tensor, rollout_NS: Tensor, mask_NS: Tensor) -> tuple[Tensor | None, Metrics]:
    """verl's mismatch estimators, and its truncated importance weights where the method wants them."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    threshold = config.method.importance_threshold
    weights, _, seen = compute_rollout_correction_and_rejection_mask(
        old_log_prob=old_NS,
        rollout_log_prob=rollout_NS,
        response_mask=mask_NS.to(torch.int64),
        rollout_is="token" if threshold is not None else None,
        rollout_is_threshold=threshold,
    )
    metrics = {
        "mismatch/kl_k1": float(seen["rollout_corr/kl"]),
        "mismatch/kl_k3": float(seen["rollout_corr/k3_kl"]),
        "mismatch/extreme_fraction": extreme_fraction(old_NS, rollout_NS, mask_NS),
    }
    return (None if weights is None else weights.batch["rollout_is_weights"]), metrics


def _advantages(samples: list[Sample], mask_NS: Tensor) -> Tensor:
    """verl's GRPO advantages: the reward, normalised within its group, at every response token."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards_NS = torch.zeros(mask_NS.shape)
    rewards_NS[:, 0] = torch.tensor([sample.reward for sample in samples])
    groups = np.array([sample.group for sample in samples])
    advantages_NS, _ = compute_grpo_outcome_advantage(rewards_NS, mask_NS.float(), groups)
    return advantages_NS


def _split_live(live_TLK: Tensor, like: list[RoutingTrace]) -> list[RoutingTrace]:
    """The trainer's own routes of the old log-prob pass, one trace a sequence; every token was fed, none is missing."""
    parts = live_TLK.numpy().astype(like[0].ids_TLK.dtype) if like else live_TLK.numpy()
    bounds = np.cumsum([0, *(trace.num_tokens for trace in like)])
    return [
        RoutingTrace(parts[start:stop], np.ones(stop - start, dtype=bool), trace.num_experts, trace.layers)
        for trace, start, stop in zip(like, bounds[:-1], bounds[1:], strict=True)
    ]


def _join(traces: list[RoutingTrace]) -> tuple[Tensor, Tensor]:
    """Ids int64 [T, L, K] and validity [T] of all traces, one after the other."""
    whole = RoutingTrace.concatenate(traces)
    return torch.from_numpy(whole.ids_TLK.astype("int64")), torch.from_numpy(whole.valid_T.copy())


def _prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}/{key}": value for key, value in metrics.items()}
