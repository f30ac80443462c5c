"""verl as the training engine: old log-probs and optimizer steps under given routes, in one process.

Shapes: N sequences, S response tokens of the longest, T tokens of one sequence or of all, P of them sampled, L MoE
layers, K experts per token, E experts, H hidden size.
"""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from moe_replay.archive.layout import MODEL_FOLDER
from moe_replay.config import TrainingConfig
from moe_replay.engines.memory import ran_out_of_memory
from moe_replay.engines.training_batch import PassRoutes, TokenSequence, as_batch, token_fields
from moe_replay.errors import OutOfMemory
from moe_replay.methods import Method
from moe_replay.routing.observation import RouterFeatures
from moe_replay.routing.trace import RoutingTrace

_FOREVER = 1 << 30


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
    """verl's FSDP2 engine around one model, with the replay of `replay_engine`."""

    def __init__(self, model: Path, weights: str, training: TrainingConfig):
        if not torch.cuda.is_available():
            os.environ.setdefault("VERL_PLATFORM", "cpu")
        import verl  # noqa: F401 (chooses the platform and loads our plugin, before any engine is imported)

        _join_process_group()
        self._training = training
        self.micro_batch_tokens = training.micro_batch_tokens
        """Most tokens of one forward pass."""
        self.weights: str | None = weights
        """Which weights, and optimizer state, the engine holds, as the caller named them."""
        self._engine = self._build(model)
        routers = self._engine.routers
        self.num_experts, self.top_k, self.layers = routers.num_experts, routers.top_k, routers.layers
        self.hidden_size = routers.hidden_size

    def load(self, folder: Path, weights: str, is_checkpoint: bool) -> None:
        """Hold the weights of `folder`, named `weights`: a model to start from, or a checkpoint of `save`.

        A model starts with a fresh optimizer; a checkpoint brings its own. Nothing happens when they are held already.
        """
        if weights == self.weights:
            return
        self.weights = None
        # The old engine goes first: two of them would double the peak of memory.
        del self._engine
        gc.collect()
        self._engine = self._build(folder / MODEL_FOLDER if is_checkpoint else folder)
        if is_checkpoint:
            self._engine.load_checkpoint(str(folder))
        self.weights = weights

    def save(self, folder: Path) -> None:
        """Write a checkpoint (`checkpoint.py` says what lies in it)."""
        self._engine.save_checkpoint(str(folder))

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
                features or predictions are asked for.
            OutOfMemory: an allocation failed.
        """
        asked = PassRoutes(routes, reference, sampled, predictor)
        with self._telling_of_memory(sequences):
            batch = self._batch(sequences, asked, temperature, calculate_entropy=True)
            with self._engine.eval_mode():
                output = self._engine.infer_batch(batch)
            return self._pass(output, batch)

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
        from verl.workers.utils.losses import ppo_loss

        per_token = {"old_log_probs": old_NS, "advantages": advantages_NS}
        if importance_NS is not None:
            per_token["rollout_is_weights"] = importance_NS
        with self._telling_of_memory(sequences):
            batch = self._batch(sequences, PassRoutes(routes, reference, sampled), temperature, per_token)
            self.weights = None
            with self._engine.train_mode():
                with self._scaled_learning_rate(lr_factor):
                    output = self._engine.train_batch(batch, partial(ppo_loss, _actor_config(method, len(sequences))))
                self._engine.lr_scheduler_step()
            return self._pass(output, batch)

    @contextmanager
    def _scaled_learning_rate(self, factor: float) -> Iterator[None]:
        groups = self._engine.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= factor
        try:
            yield
        finally:
            for group, learning_rate in zip(groups, scheduled, strict=True):
                group["lr"] = learning_rate

    def _build(self, model: Path) -> Any:
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
        from verl.workers.engine import EngineRegistry

        from moe_replay.engines.replay_engine import MODEL_TYPE

        training = self._training
        engine = EngineRegistry.new(
            model_type=MODEL_TYPE,
            backend="fsdp2",
            model_config=HFModelConfig(
                path=str(model),
                override_config={"attn_implementation": "sdpa"},
                use_remove_padding=False,
                enable_gradient_checkpointing=training.recompute,
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype="fp32",
                mixed_precision={
                    "param_dtype": {"float32": "fp32", "bfloat16": "bf16"}[training.dtype],
                    "reduce_dtype": "fp32",
                    "buffer_dtype": "fp32",
                },
                use_torch_compile=False,
                param_offload=False,
                optimizer_offload=False,
            ),
            optimizer_config=FSDPOptimizerConfig(
                lr=training.learning_rate,
                lr_warmup_steps=training.warmup_steps,
                total_training_steps=_FOREVER,  # the schedule is constant after the warm-up and never ends
                betas=training.adam_betas,
                weight_decay=training.weight_decay,
                clip_grad=training.max_grad_norm,
            ),
            checkpoint_config=CheckpointConfig(save_contents=[], load_contents=[]),
        )
        engine.initialize()
        # Others of transformers' implementations are 10 to 50 times slower on a CPU.
        engine.module.set_experts_implementation("grouped_mm")
        return engine

    def _batch(
        self,
        sequences: Sequence[TokenSequence],
        asked: PassRoutes,
        temperature: float,
        per_token: dict[str, Tensor] | None = None,
        calculate_entropy: bool = False,
    ) -> TensorDict:
        fields = token_fields(sequences, per_token or {})
        fields |= asked.fields(sequences, self.num_experts, self.top_k, self.layers)
        settings = {} if asked.predictor is None else {"gate_predictor": asked.predictor}
        return as_batch(
            fields,
            len(sequences),
            max_token_len_per_gpu=self.micro_batch_tokens,
            temperature=temperature,
            calculate_entropy=calculate_entropy,
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
            largest = min(tokens, self.micro_batch_tokens)
            raise OutOfMemory(
                f"a training pass over {len(sequences)} sequences of {tokens} tokens, in micro-batches of up to "
                f"{largest}, ran out of memory ({str(error).splitlines()[0][:300]})",
                largest,
            ) from error

    def _pass(self, output: dict[str, Any], batch: TensorDict) -> Pass:
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


def _actor_config(method: Method, sequences: int) -> Any:
    """verl's own description of the method's policy loss over one mini-step."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,  # read by verl's trainer, not by its loss
        ppo_mini_batch_size=sequences,
        ppo_micro_batch_size_per_gpu=sequences,
        use_dynamic_bsz=True,
        clip_ratio_low=method.clip_low,
        clip_ratio_high=method.clip_high,
        loss_agg_mode=method.loss_aggregation,
        policy_loss=PolicyLossConfig(loss_mode=method.policy_loss),
    )


def _join_process_group() -> None:
    """A process group of one, without a port. Under Ray the worker has joined the real one before."""
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
