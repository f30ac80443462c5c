"""The old log-prob pass of a rollout batch: what training starts from, and what it shows of mismatch.

Shapes: N sequences of the rollout batch, S response tokens of the longest, T tokens of a mini-batch, L MoE layers,
K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_replay.archive.read_ahead import read_ahead
from moe_replay.archive.routes import RouteArchive
from moe_replay.config import RunConfig
from moe_replay.engines.training import TrainingEngine
from moe_replay.routing.metrics import extreme_fraction, kl_estimates
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.evolution import EvolutionRecorder
from moe_replay.stages.responses import Responses
from moe_replay.stages.route_observation import Metrics, RouteObservation, Traces


@dataclass(frozen=True)
class Batch:
    """A rollout batch with what the loss needs of it."""

    responses: Responses
    old_NS: Tensor
    """Log-probs of the old log-prob pass."""
    advantages_NS: Tensor
    importance_NS: Tensor | None
    """Truncated importance weights."""
    own: list[Traces] | None
    """By mini-batch: the routes that the trainer chose in the old log-prob pass, where the method replays those."""


def captured_routes(engine: TrainingEngine, archive: RouteArchive, parts: list[slice]) -> Iterator[Traces]:
    """The inference engine's routes by mini-batch, in the layers of `engine`; the next is read while one computes."""
    layers = archive.require_model(engine.num_experts, engine.top_k, engine.layers)

    def read(part: slice) -> Traces:
        traces = archive.read_sequences(part.start, part.stop, layers)
        # How the archive keeps routes must not reach the weights, not even through the order of a sum.
        return traces if archive.provenance.order == "ascending" else [trace.ascending() for trace in traces]

    return read_ahead(read, parts)


def old_log_prob_pass(
    engine: TrainingEngine,
    config: RunConfig,
    responses: Responses,
    archive: RouteArchive,
    observation: RouteObservation,
    recorder: EvolutionRecorder | None,
    predictor: EvolutionPredictor | None,
) -> tuple[Batch, Metrics]:
    """Score the batch under the method's routes; then advantages and corrections, and the metrics of mismatch.

    Mini-batches are scored as they will be trained, so that the first mini-step starts at a ratio of exactly 1, and
    routes of no more than two of them are held. A `predictor` steers the trainer's own routes of this pass, which the
    method then replays (the variant of PR2 that its authors released).
    """
    parts = responses.parts(config.training.mini_steps)
    width, replays = responses.mask_NS.shape[1], config.method.route_source == "rollout"
    old, entropy, own = [], [], []
    for step, (part, captured) in enumerate(zip(parts, captured_routes(engine, archive, parts), strict=True), start=1):
        one = engine.score(
            responses.sequences[part],
            captured if replays else None,
            config.rollout.temperature,
            sampled=recorder.sampled(step) if recorder else None,
            predictor=predictor.weights if predictor else None,
        )
        assert one.entropy_NS is not None
        old.append(pad(one.log_probs_NS, (0, width - one.log_probs_NS.shape[1])))
        entropy.append(pad(one.entropy_NS, (0, width - one.entropy_NS.shape[1])))
        observation.add_old_pass(captured, one)
        if recorder:
            recorder.before(step, one)
        if config.method.route_source == "old_log_prob":
            own.append(by_sequence(one.own_TLK, captured))
    old_NS = torch.cat(old)
    both = old_NS, responses.rollout_NS, responses.mask_NS
    importance_NS, metrics = _importance(*both, config.method.importance_threshold), _mismatch(*both)
    metrics["policy/entropy"] = torch.cat(entropy)[responses.mask_NS].mean().item()
    return Batch(responses, old_NS, _advantages(responses), importance_NS, own or None), metrics


def _mismatch(old_NS: Tensor, rollout_NS: Tensor, mask_NS: Tensor) -> Metrics:
    """How far the trainer's policy is from the one that sampled."""
    k1, k3 = kl_estimates(rollout_NS, old_NS, mask_NS)
    return {
        "mismatch/kl_k1": k1,
        "mismatch/kl_k3": k3,
        "mismatch/extreme_fraction": extreme_fraction(old_NS, rollout_NS, mask_NS),
    }


def _importance(old_NS: Tensor, rollout_NS: Tensor, mask_NS: Tensor, threshold: float | None) -> Tensor | None:
    """verl's truncated importance weights, where the method wants them."""
    if threshold is None:
        return None
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    weights, _, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=old_NS,
        rollout_log_prob=rollout_NS,
        response_mask=mask_NS.to(torch.int64),
        rollout_is="token",
        rollout_is_threshold=threshold,
    )
    assert weights is not None
    return weights.batch["rollout_is_weights"]


def _advantages(responses: Responses) -> Tensor:
    """verl's GRPO advantages: the reward, normalised within its group, at every response token."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards_NS = torch.zeros(responses.mask_NS.shape)
    rewards_NS[:, 0] = responses.rewards_N
    advantages_NS, _ = compute_grpo_outcome_advantage(rewards_NS, responses.mask_NS.float(), responses.groups_N)
    return advantages_NS


def by_sequence(ids_TLK: Tensor, like: Traces) -> Traces:
    """The trainer's own routes of the old log-prob pass, one trace a sequence; every token was fed, none is missing."""
    parts = ids_TLK.numpy().astype(like[0].ids_TLK.dtype) if like else ids_TLK.numpy()
    bounds = np.cumsum([0, *(trace.num_tokens for trace in like)])
    return [
        RoutingTrace(parts[start:stop], np.ones(stop - start, dtype=bool), trace.num_experts, trace.layers)
        for trace, start, stop in zip(like, bounds[:-1], bounds[1:], strict=True)
    ]
