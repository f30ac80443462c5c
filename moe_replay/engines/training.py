"""verl as the training engine: old log-probs and optimizer steps under given routes, in one process.

Shapes: N sequences, S response tokens of the longest, T tokens of one sequence, L MoE layers, K experts per token.
"""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from moe_replay.config import TrainingConfig
from moe_replay.engines.checkpoint import MODEL_FOLDER
from moe_replay.errors import RoutingMismatch
from moe_replay.methods import Method
from moe_replay.routing.trace import RoutingTrace

_FOREVER = 1 << 30


@dataclass(frozen=True)
class TokenSequence:
    """Prompt and response of one sample."""

    prompt_ids: Tensor
    response_ids: Tensor


@dataclass(frozen=True)
class Pass:
    """What a pass over N sequences saw, before its optimizer step if it had one."""

    log_probs_NS: Tensor
    entropy_NS: Tensor | None
    """Of a scoring pass; a step does not compute it."""
    live_TLK: Tensor
    """The routers' own choice for all tokens of all sequences, int32, in the order given."""
    loss: float
    grad_norm: float


class TrainingEngine:
    """verl's FSDP2 engine around one model, with the replay of `replay_engine`."""

    def __init__(self, model: Path, weights: str, training: TrainingConfig):
        if not torch.cuda.is_available():
            os.environ.setdefault("VERL_PLATFORM", "cpu")
        import verl  # noqa: F401 (chooses the platform and loads our plugin, before any engine is imported)

        _join_process_group()
        self._training = training
        self.weights: str | None = weights
        """Which weights, and optimizer state, the engine holds, as the caller named them."""
        self._engine = self._build(model)
        routers = self._engine.routers
        self.num_experts, self.top_k, self.layers = routers.num_experts, routers.top_k, routers.layers

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
        self, sequences: Sequence[TokenSequence], routes: Sequence[RoutingTrace] | None, temperature: float
    ) -> Pass:
        """Log-probs of the responses at `temperature` without gradient, replaying `routes` where given."""
        batch = self._batch(sequences, routes, temperature, calculate_entropy=True)
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
    ) -> Pass:
        """One optimizer step of the method's policy loss on these sequences, sampled at `temperature`."""
        from verl.workers.utils.losses import ppo_loss

        self.weights = None
        per_token = {"old_log_probs": old_NS, "advantages": advantages_NS}
        if importance_NS is not None:
            per_token["rollout_is_weights"] = importance_NS
        batch = self._batch(sequences, routes, temperature, per_token)
        with self._engine.train_mode():
            output = self._engine.train_batch(batch, partial(ppo_loss, _actor_config(method, len(sequences))))
            self._engine.lr_scheduler_step()
        return self._pass(output, batch)

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
        routes: Sequence[RoutingTrace] | None,
        temperature: float,
        per_token: dict[str, Tensor] | None = None,
        calculate_entropy: bool = False,
    ) -> TensorDict:
        """The sequences in verl's layout: nested tensors without padding."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.dataset.dataset_utils import DatasetPadMode

        whole = [torch.cat([sequence.prompt_ids, sequence.response_ids]) for sequence in sequences]
        lengths = [len(sequence.response_ids) for sequence in sequences]
        fields = {
            "input_ids": _nested(whole),
            "position_ids": _nested([torch.arange(len(ids)) for ids in whole]),
            "prompts": _nested([sequence.prompt_ids for sequence in sequences]),
            "responses": _nested([sequence.response_ids for sequence in sequences]),
            "response_mask": _nested([torch.ones(length, dtype=torch.int64) for length in lengths]),
            "loss_mask": _nested(
                [torch.cat([torch.zeros(len(s.prompt_ids)), torch.ones(len(s.response_ids))]) for s in sequences]
            ),
        }
        for name, values_NS in (per_token or {}).items():
            fields[name] = _nested([row[:length] for row, length in zip(values_NS, lengths, strict=True)])
        if routes is not None:
            fields["routed_experts"] = _nested(
                [
                    self._aligned(number, trace, len(ids))
                    for number, (trace, ids) in enumerate(zip(routes, whole, strict=True))
                ]
            )
        batch = TensorDict(fields, batch_size=[len(sequences)])
        tu.assign_non_tensor(
            batch,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=self._training.micro_batch_tokens,
            use_remove_padding=False,
            use_fused_kernels=False,
            pad_mode=DatasetPadMode.NO_PADDING,
            temperature=temperature,
            calculate_entropy=calculate_entropy,
            return_model_output=True,
            global_batch_size=len(sequences),
        )
        return batch

    def _aligned(self, number: int, trace: RoutingTrace, tokens: int) -> Tensor:
        """The trace as verl's `routed_experts` of one sequence: int32 [T, L, K], -1 where there is no route."""
        from moe_replay.engines.replay_engine import NO_ROUTE

        trace.require_model(self.num_experts, self.top_k, self.layers, f"the trace of sequence {number}")
        if trace.num_tokens != tokens:
            raise RoutingMismatch(
                f"routes cover {trace.num_tokens} rows but sequence {number} has {tokens} tokens; "
                "they belong to other tokens: re-run the rollout, routes are never padded"
            )
        ids_TLK = torch.from_numpy(trace.ids_TLK.astype("int32"))
        ids_TLK[~torch.from_numpy(trace.valid_T)] = NO_ROUTE
        return ids_TLK

    def _pass(self, output: dict[str, Any], batch: TensorDict) -> Pass:
        from verl.workers.utils.padding import no_padding_2_padding

        seen = output["model_output"]
        entropy = seen.get("entropy")
        return Pass(
            log_probs_NS=no_padding_2_padding(seen["log_probs"], batch).float().cpu(),
            entropy_NS=None if entropy is None else no_padding_2_padding(entropy, batch).float().cpu(),
            live_TLK=seen["live_experts"].values().cpu(),
            loss=float(sum(output["loss"])),
            grad_norm=float(output["metrics"].get("grad_norm", 0.0)),
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


def _nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _join_process_group() -> None:
    """A process group of one, without a port. Under Ray the worker has joined the real one before."""
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
