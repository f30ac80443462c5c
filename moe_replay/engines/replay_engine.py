"""verl's FSDP2 engine, with routes recorded, replayed or predicted (model type `replayed_language_model`).

Legend of shapes: B sequences of a micro-batch, R rows that reach the routers of this rank, T tokens of all sequences,
P of them sampled, L MoE layers, K experts per token, E experts, H hidden size.

What a pass is to do travels inside the batch, since verl's micro-batching reorders sequences; targets are built from
the micro-batch itself, in the layout that the model is about to see. Tensors are nested by sequence:
- `routed_experts`, verl's own: routes to replay, [B, tokens, L, K], -1 in rows without a route;
- `reference_experts`, likewise: routes whose coverage gap is measured, by default those replayed;
- `sampled_rows`: bool [B, tokens], the tokens whose router features are kept;
- `gate_predictor`, non-tensor: W_p [E, H] by decoder layer, to route by h (W + W_p);
- `method` and `lr_factor`, non-tensor, of a step: the method whose policy loss it is on, and what multiplies the
  learning rate of this step alone.

What it saw comes back in the model's output, in the order of the sequences: `live_experts` [B, tokens, L, K] always,
the routers' own choice; `coverage_gap` [B, tokens, L] with a reference; `router_hidden` [B, sampled, L, H] and
`router_logits` [B, sampled, L, E], float32 on the CPU, with sampled rows; `predicted_experts` [B, tokens, L, K], what
was routed, with a predictor.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from moe_replay.engines.adapters import reproducible_start, train_routers
from moe_replay.engines.checkpoint import SafetensorsCheckpointManager
from moe_replay.engines.ranks import RouterShape
from moe_replay.engines.row_layout import PackedRows, PaddedRows, RowLayout
from moe_replay.engines.verl_settings import actor_config
from moe_replay.routing.routers import Routers

MODEL_TYPE = "replayed_language_model"
NO_ROUTE = -1
"""Fills the rows of `routed_experts` that have no route; they are routed live."""


_FSDPEngine: Any = FSDPEngineWithLMHead  # verl's registering decorator hides its class from type checkers


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cpu", "cuda", "npu"])
class ReplayEngine(_FSDPEngine):
    """Replays or predicts experts where the batch says so, else routes live; records the live choice always."""

    module: Any
    optimizer: Any
    lr_scheduler: Any
    routers: Routers

    def initialize(self) -> None:
        """Build model and optimizer as verl does, then find the routers of the live, sharded model."""
        # verl's worker names the engine here, by what the engine itself looks up how to read the model.
        self.model_config.model_type = "language_model"
        super().initialize()
        self.routers = Routers(self.module)
        # Others of transformers' implementations are 10 to 50 times slower on a CPU.
        self.module.set_experts_implementation("grouped_mm")
        self.checkpoint_manager = SafetensorsCheckpointManager(
            model=self.module,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            processing_class=self.model_config.get_processor(),
            checkpoint_config=self.checkpoint_config,
        )

    def _build_lora_module(self, module: Any) -> Any:
        """verl's adapters; and the routers' own weights, where they are trained beside them."""
        with reproducible_start():
            module = super()._build_lora_module(module)
        if self.model_config.lora["train_routers"]:
            train_routers(module)
        return module

    def release(self) -> None:
        """Let go of model and optimizer, so that others can be built in their room."""
        if routers := self.__dict__.pop("routers", None):  # none before the first model
            routers.remove()  # they hold the decoder
        self.module = self.optimizer = self.lr_scheduler = self.checkpoint_manager = None
        gc.collect()

    @property
    def router_shape(self) -> RouterShape:
        """Of the model that was built."""
        routers = self.routers
        return RouterShape(routers.num_experts, routers.top_k, routers.layers, routers.hidden_size)

    def score(self, batch: TensorDict) -> Any:
        """verl's output of a pass without gradient."""
        with self.eval_mode():
            return self.infer_batch(batch)

    def step(self, batch: TensorDict) -> Any:
        """verl's output of one optimizer step, seen before the weights changed."""
        method: Any = tu.get_non_tensor_data(batch, "method", None)
        factor: Any = tu.get_non_tensor_data(batch, "lr_factor", 1.0)
        sequences: Any = tu.get_non_tensor_data(batch, "global_batch_size", None)
        with self.train_mode():
            with self._scaled_learning_rate(factor):
                output = self.train_batch(batch, partial(ppo_loss, actor_config(method, sequences)))
            self.lr_scheduler_step()
        return output

    @contextmanager
    def _scaled_learning_rate(self, factor: float) -> Iterator[None]:
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= factor
        try:
            yield
        finally:
            for group, learning_rate in zip(groups, scheduled, strict=True):
                group["lr"] = learning_rate

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """As verl's; targets outlive each forward, since recompute meets them again in backward, but not the batch."""
        try:
            return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self.routers.route_live()
            self.routers.forget()

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool) -> Any:
        """One micro-batch through the model under its own routes."""
        rows = self._layout(micro_batch)
        self._steer(micro_batch, rows)
        self._observe(micro_batch, rows)
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        output["model_output"] |= self._seen(micro_batch, rows)
        return loss, output

    def _layout(self, micro_batch: TensorDict) -> RowLayout:
        input_ids: Any = micro_batch["input_ids"]
        if self.use_remove_padding:
            return PackedRows(len(input_ids.values()), self.ulysses_parallel_group)
        return PaddedRows(input_ids.offsets().diff())

    def _steer(self, micro_batch: TensorDict, rows: RowLayout) -> None:
        predictor: Any = tu.get_non_tensor_data(micro_batch, "gate_predictor", None)
        if predictor is not None:
            self.routers.predict(predictor, rows.real_R.to(get_device_id()))
        elif "routed_experts" in micro_batch.keys():  # noqa: SIM118 (a TensorDict is no dict)
            self.routers.replay(*_row_routes(micro_batch["routed_experts"], rows))
        else:
            self.routers.route_live()

    def _observe(self, micro_batch: TensorDict, rows: RowLayout) -> None:
        given = micro_batch.keys()
        self.routers.forget()
        if "reference_experts" in given:
            self.routers.compare(*_row_routes(micro_batch["reference_experts"], rows))
        elif "routed_experts" in given:
            self.routers.compare()
        if "sampled_rows" in given:
            sampled: Any = micro_batch["sampled_rows"]
            self.routers.watch(rows.to_rows(sampled.values(), False).nonzero()[:, 0].to(get_device_id()))

    def _seen(self, micro_batch: TensorDict, rows: RowLayout) -> dict[str, Tensor]:
        """What the routers saw of the tokens, nested by sequence."""
        given = micro_batch.keys()
        input_ids: Any = micro_batch["input_ids"]
        seen = {"live_experts": self.routers.live_RLK.to(torch.int32)}
        if "gate_predictor" in given:
            seen["predicted_experts"] = self.routers.routed_RLK.to(torch.int32)
        if "reference_experts" in given or "routed_experts" in given:
            seen["coverage_gap"] = self.routers.coverage_gap_RL
        by_sequence = {name: _nested(rows.to_tokens(values), input_ids.offsets()) for name, values in seen.items()}
        if "sampled_rows" in given:
            sampled: Any = micro_batch["sampled_rows"]
            features = self.routers.features
            counts = torch.tensor([0, *(int(flags.sum()) for flags in sampled.unbind())])
            for name, values in (("router_hidden", features.hidden_SLH), ("router_logits", features.logits_SLE)):
                watched = rows.watched_to_tokens(values, sampled.values())
                by_sequence[name] = _nested(watched.cpu(), counts.cumsum(0))
        return by_sequence


def _nested(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets.to(values.device))


def _row_routes(nested: Any, rows: RowLayout) -> tuple[Tensor, Tensor]:
    """int64 ids [R, L, K] and, per row, whether it has a route: padding and rows of `NO_ROUTE` have none."""
    ids_RLK = rows.to_rows(nested.values().to(torch.int64), NO_ROUTE).to(get_device_id())
    return ids_RLK.clamp_min(0), (ids_RLK != NO_ROUTE).all(-1).all(-1)
