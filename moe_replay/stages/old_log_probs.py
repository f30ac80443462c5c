"""The old log-prob pass of a rollout batch: what training starts from, and what it shows of mismatch.

Shapes: N sequences of the rollout batch, S response tokens of the longest, T tokens of all sequences, L MoE layers,
K experts per token, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from moe_replay.archive.read_ahead import read_ahead
from moe_replay.archive.routes import RouteArchive
from moe_replay.config import RunConfig
from moe_replay.engines.training import TokenSequence, TrainingEngine
from moe_replay.routing.metrics import expert_load, extreme_fraction, load_imbalance, router_mismatch_metrics
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.samples import Answer

Metrics = dict[str, float]
Traces = list[RoutingTrace]


@dataclass(frozen=True)
class Responses:
    """The samples of a rollout batch without their routes, which the archive holds."""

    sequences: list[TokenSequence]
    digests: list[bytes]
    mask_NS: Tensor
    rollout_NS: Tensor
    """Log-probs that the inference engine sampled with."""
    rewards_N: Tensor
    groups_N: np.ndarray

    @classmethod
    def of(cls, answers: Iterator[Answer]) -> "Responses":
        """Take what training needs of each answer."""
        kept = [
            (
                TokenSequence(torch.tensor(answer.prompt_ids), torch.tensor(answer.response_ids)),
                torch.tensor(answer.log_probs),
                (answer.token_digest, answer.reward, answer.group),
            )
            for answer in answers
        ]
        sequences, log_probs, told = zip(*kept, strict=True)
        digests, rewards, groups = zip(*told, strict=True)
        lengths = [torch.ones(len(sequence.response_ids), dtype=torch.bool) for sequence in sequences]
        return cls(
            list(sequences),
            list(digests),
            pad_sequence(lengths, batch_first=True),
            pad_sequence(list(log_probs), batch_first=True),
            torch.tensor(rewards),
            np.array(groups),
        )

    def parts(self, number: int) -> list[slice]:
        """The batch in `number` mini-batches of equal size."""
        size = len(self.sequences) // number
        return [slice(part * size, (part + 1) * size) for part in range(number)]


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
    """By mini-batch: the trainer's own routes of the old log-prob pass, where the method replays those."""


def captured_routes(engine: TrainingEngine, archive: RouteArchive, parts: list[slice]) -> Iterator[Traces]:
    """The inference engine's routes by mini-batch, in the layers of `engine`; the next is read while one computes."""
    layers = archive.require_model(engine.num_experts, engine.top_k, engine.layers)

    def read(part: slice) -> Traces:
        traces = archive.read_sequences(part.start, part.stop, layers)
        # How the archive keeps routes must not reach the weights, not even through the order of a sum.
        return traces if archive.provenance.order == "ascending" else [trace.ascending() for trace in traces]

    return read_ahead(read, parts)


def old_log_prob_pass(
    engine: TrainingEngine, config: RunConfig, responses: Responses, archive: RouteArchive
) -> tuple[Batch, Metrics]:
    """Score the batch under the method's routes; then advantages and corrections, and the metrics of mismatch.

    Mini-batches are scored as they will be trained, so that the first mini-step starts at a ratio of exactly 1, and
    routes of no more than two of them are held.
    """
    parts = responses.parts(config.training.mini_steps)
    width, replays = responses.mask_NS.shape[1], config.method.route_source == "rollout"
    seen = _Mismatch(engine.num_experts)
    old, entropy, own = [], [], []
    for part, captured in zip(parts, captured_routes(engine, archive, parts), strict=True):
        one = engine.score(responses.sequences[part], captured if replays else None, config.rollout.temperature)
        assert one.entropy_NS is not None
        old.append(pad(one.log_probs_NS, (0, width - one.log_probs_NS.shape[1])))
        entropy.append(pad(one.entropy_NS, (0, width - one.entropy_NS.shape[1])))
        seen.add(captured, one.live_TLK)
        if config.method.route_source == "old_log_prob":
            own.append(_split_live(one.live_TLK, captured))
    old_NS = torch.cat(old)
    importance_NS, metrics = _mismatch(config, old_NS, responses.rollout_NS, responses.mask_NS)
    metrics["policy/entropy"] = torch.cat(entropy)[responses.mask_NS].mean().item()
    batch = Batch(responses, old_NS, _advantages(responses), importance_NS, own or None)
    return batch, metrics | seen.metrics()


class _Mismatch:
    """Router mismatch and load, gathered mini-batch by mini-batch."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._parts: list[tuple[int, Metrics]] = []
        self._load_LE: Tensor | int = 0
        self._tokens = 0

    def add(self, captured: Traces, live_TLK: Tensor) -> None:
        """Compare the routes of one mini-batch with the trainer's own choice."""
        ids_TLK, valid_T = join(captured)
        self._tokens += len(valid_T)
        router_mismatch = router_mismatch_metrics(ids_TLK[valid_T], live_TLK[valid_T].long())
        self._parts.append((int(valid_T.sum()), prefixed("mismatch", router_mismatch)))
        self._load_LE = self._load_LE + expert_load(ids_TLK[valid_T], self._num_experts)

    def metrics(self) -> Metrics:
        """Means over all captured tokens."""
        parts = [(count, metrics) for count, metrics in self._parts if count]
        captured = sum(count for count, _ in parts)
        names = parts[0][1] if parts else {}
        assert isinstance(self._load_LE, Tensor)
        return {
            **{name: sum(count * part[name] for count, part in parts) / captured for name in names},
            "routing/load_imbalance": load_imbalance(self._load_LE),
            "routing/missing_fraction": 1 - captured / self._tokens,
        }


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


def _advantages(responses: Responses) -> Tensor:
    """verl's GRPO advantages: the reward, normalised within its group, at every response token."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards_NS = torch.zeros(responses.mask_NS.shape)
    rewards_NS[:, 0] = responses.rewards_N
    advantages_NS, _ = compute_grpo_outcome_advantage(rewards_NS, responses.mask_NS.float(), responses.groups_N)
    return advantages_NS


def _split_live(live_TLK: Tensor, like: list[RoutingTrace]) -> list[RoutingTrace]:
    """The trainer's own routes of the old log-prob pass, one trace a sequence; every token was fed, none is missing."""
    parts = live_TLK.numpy().astype(like[0].ids_TLK.dtype) if like else live_TLK.numpy()
    bounds = np.cumsum([0, *(trace.num_tokens for trace in like)])
    return [
        RoutingTrace(parts[start:stop], np.ones(stop - start, dtype=bool), trace.num_experts, trace.layers)
        for trace, start, stop in zip(like, bounds[:-1], bounds[1:], strict=True)
    ]


def join(traces: list[RoutingTrace]) -> tuple[Tensor, Tensor]:
    """Ids int64 [T, L, K] and validity [T] of all traces, one after the other."""
    whole = RoutingTrace.concatenate(traces)
    return torch.from_numpy(whole.ids_TLK.astype("int64")), torch.from_numpy(whole.valid_T.copy())


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    """The metrics under `prefix/`."""
    return {f"{prefix}/{key}": value for key, value in metrics.items()}
