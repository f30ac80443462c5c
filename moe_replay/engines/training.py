"""verl as the training engine: old log-probs and optimizer steps under given routes.

Shapes: N sequences, S response tokens of the longest, T tokens of one sequence or of all, P of them sampled, L MoE
layers, K experts per token, E experts, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from moe_replay.archive.layout import MODEL_FOLDER
from moe_replay.engines.megatron_replay import require_megatron_pass
from moe_replay.engines.memory import ran_out_of_memory
from moe_replay.engines.ranks import make_ranks
from moe_replay.engines.training_batch import PassRoutes, TokenSequence, as_batch, token_fields
from moe_replay.errors import OutOfMemory
from moe_replay.methods import Method
from moe_replay.routing.observation import RouterFeatures
from moe_replay.routing.trace import RoutingTrace
from moe_replay.sections import ResourcesConfig, TrainingConfig


@dataclass(frozen=True)
class Pass:
    """What a pass over N sequences saw, before its optimizer step if it had one."""

    log_probs_NS: Tensor
    entropy_NS: Tensor | None
    """Of a scoring pass; a step does not compute it."""
    live_TLK: Tensor
    """The routers' own choice for all tokens of all sequences, int32, in the order given."""
    coverage_gap_TL: Tensor
    """1 - Σ softmax(p) over the reference's experts, float32; NaN where the token has no reference route."""
    loss: float
    grad_norm: float
    features: RouterFeatures | None = None
    """What the routers got and gave for the sampled tokens, on the CPU, in the order of the sequences given."""
    routed_TLK: Tensor | None = None
    """The experts that a pass under a predictor routed to, int32; a set's order is that of the pass."""

    @property
    def own_TLK(self) -> Tensor:  # noqa: N802  (shape-suffixed)
        """What the trainer chose where nothing was replayed: the predicted experts under a predictor, else the live."""
        return self.live_TLK if self.routed_TLK is None else self.routed_TLK


class TrainingEngine:
    """verl's engine around one model, on one rank or more, with the replay of `replay_engine` or `megatron_engine`."""

    def __init__(
        self,
        model: Path,
        weights: str,
        training: TrainingConfig,
        resources: ResourcesConfig = ResourcesConfig(),  # noqa: B008 (frozen)
    ):
        self._ranks = make_ranks(training, resources)
        self._packing = training.packing
        self._is_megatron = training.engine == "megatron"
        self._sharing_ranks = resources.training_world_size // resources.training_pipeline_parallel_size
        self._beside_adapters = model if training.lora.rank else None
        """The weights that a checkpoint's adapters are added to."""
        self.micro_batch_tokens = training.micro_batch_tokens
        """Most tokens of one forward pass of a rank."""
        self.weights: str | None = weights
        """Which weights, and optimizer state, the engine holds, as the caller named them."""
        self._hold(model)

    def load(self, folder: Path, weights: str, is_checkpoint: bool) -> None:
        """Hold the weights of `folder`, named `weights`: a model to start from, or a checkpoint of `save`.

        A checkpoint of adapters is one of an engine that was built with the same model as this one.

        A model starts with a fresh optimizer; a checkpoint brings its own, whatever the number of ranks that wrote it.
        Nothing happens when they are held already.
        """
        if weights == self.weights:
            return
        self.weights = None
        self._hold((self._beside_adapters or folder / MODEL_FOLDER) if is_checkpoint else folder)
        if is_checkpoint:
            self._ranks.restore(folder)
        self.weights = weights

    def save(self, folder: Path) -> None:
        """Write a checkpoint (`checkpoint.py` says what lies in it)."""
        self._ranks.save(folder)

    def score(
        self,
        sequences: Sequence[TokenSequence],
        routes: Sequence[RoutingTrace] | None,
        temperature: float,
        reference: Sequence[RoutingTrace] | None = None,
        sampled: Sequence[npt.NDArray[np.int64]] | None = None,
        predictor: Mapping[int, Tensor] | None = None,
    ) -> Pass:
        """Log-probs of the responses at `temperature` without gradient, replaying `routes` where given.

        Args:
            sequences: what to score.
            routes: one trace a sequence; without them the routers choose.
            temperature: of the sampling that is scored.
            reference: traces whose coverage gap is measured, by default `routes`.
            sampled: by sequence, ascending positions of the tokens whose router features are kept.
            predictor: W_p [E, H] by decoder layer: route to topk(p + h W_p), under weights of the live p.

        Raises:
            RoutingMismatch: routes, reference, positions or predictor are not of these tokens or this model.
            ConfigError: routes and a predictor are given, or the model's routers choose by more than their logits and
                features or predictions are asked for; or as `require_megatron_pass`.
            OutOfMemory: an allocation failed.
        """
        asked = PassRoutes(routes, reference, sampled, predictor)
        with self._telling_of_memory(sequences):
            batch = self._batch(sequences, asked, temperature, calculate_entropy=True)
            return _pass(self._ranks.score(batch), batch)

    def step(
        self,
        sequences: Sequence[TokenSequence],
        routes: Sequence[RoutingTrace] | None,
        old_NS: Tensor,
        advantages_NS: Tensor,
        importance_NS: Tensor | None,
        method: Method,
        temperature: float,
        reference: Sequence[RoutingTrace] | None = None,
        sampled: Sequence[npt.NDArray[np.int64]] | None = None,
        lr_factor: float = 1.0,
    ) -> Pass:
        """One optimizer step of the method's policy loss on these sequences, sampled at `temperature`.

        What is returned was seen before the weights changed. Routes, reference and sampled as in `score`; `lr_factor`
        multiplies the learning rate of this step alone.
        """
        per_token = {"old_log_probs": old_NS, "advantages": advantages_NS}
        if importance_NS is not None:
            per_token["rollout_is_weights"] = importance_NS
        with self._telling_of_memory(sequences):
            asked = PassRoutes(routes, reference, sampled)
            batch = self._batch(sequences, asked, temperature, per_token, method=method, lr_factor=lr_factor)
            self.weights = None
            return _pass(self._ranks.step(batch), batch)

    def _hold(self, model: Path) -> None:
        self.num_experts, self.top_k, self.layers, self.hidden_size = self._ranks.build(model)

    def _batch(
        self,
        sequences: Sequence[TokenSequence],
        asked: PassRoutes,
        temperature: float,
        per_token: dict[str, Tensor] | None = None,
        **settings: object,
    ) -> TensorDict:
        fields = token_fields(sequences, per_token or {})
        fields |= asked.fields(sequences, self.num_experts, self.top_k, self.layers)
        if self._is_megatron:
            require_megatron_pass(asked, fields)
        if asked.predictor is not None:
            settings["gate_predictor"] = asked.predictor
        return as_batch(
            fields,
            len(sequences),
            self._packing,
            max_token_len_per_gpu=self.micro_batch_tokens,
            temperature=temperature,
            **settings,
        )

    @contextmanager
    def _telling_of_memory(self, sequences: Sequence[TokenSequence]) -> Iterator[None]:
        """Raise an allocation that failed as OutOfMemory with the size of the micro-batches it failed with."""
        try:
            yield
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            tokens = sum(sequence.num_tokens for sequence in sequences)
            # Of one rank, as the config has it; pipeline stages are at the same tokens.
            largest = min(-(-tokens // self._sharing_ranks), self.micro_batch_tokens)
            raise OutOfMemory(
                f"a training pass over {len(sequences)} sequences of {tokens} tokens, in micro-batches of up to "
                f"{largest}, ran out of memory ({str(error).splitlines()[0][:300]})",
                largest,
            ) from error


def _pass(output: dict[str, Any], batch: TensorDict) -> Pass:
    from verl.workers.utils.padding import no_padding_2_padding

    seen = output["model_output"]
    live_TLK = seen["live_experts"].values().cpu()
    entropy, gap, routed, features = *map(seen.get, ("entropy", "coverage_gap", "predicted_experts")), None
    if "router_hidden" in seen:
        features = RouterFeatures(seen["router_hidden"].values(), seen["router_logits"].values())
    return Pass(
        log_probs_NS=no_padding_2_padding(seen["log_probs"], batch).float().cpu(),
        entropy_NS=None if entropy is None else no_padding_2_padding(entropy, batch).float().cpu(),
        live_TLK=live_TLK,
        coverage_gap_TL=torch.full(live_TLK.shape[:2], torch.nan) if gap is None else gap.values().cpu(),
        loss=float(sum(output["loss"])),
        grad_norm=float(output["metrics"].get("grad_norm", 0.0)),
        features=features,
        routed_TLK=None if routed is None else routed.values().cpu(),
    )
