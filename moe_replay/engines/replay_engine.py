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

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from moe_replay.engines.adapters import reproducible_start, train_routers
from moe_replay.engines.checkpoint import SafetensorsCheckpointManager
from moe_replay.engines.observed_passes import MODEL_TYPE, ObservedPasses, row_routes
from moe_replay.engines.row_layout import PackedRows, PaddedRows, RowLayout
from moe_replay.routing.routers import Routers

_FSDPEngine: Any = FSDPEngineWithLMHead  # verl's registering decorator hides its class from type checkers


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cpu", "cuda", "npu"])
class ReplayEngine(ObservedPasses, _FSDPEngine):
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
            self.routers.replay(*row_routes(micro_batch["routed_experts"], rows))
        else:
            self.routers.route_live()

    def _compare_with_replayed(self, micro_batch: TensorDict, rows: RowLayout) -> None:
        self.routers.compare()  # they hold the routes already

    def _seen_of_rows(self, micro_batch: TensorDict) -> dict[str, Tensor]:
        seen = super()._seen_of_rows(micro_batch)
        if "gate_predictor" in micro_batch.keys():  # noqa: SIM118 (a TensorDict is no dict)
            seen["predicted_experts"] = self.routers.routed_RLK.to(torch.int32)
        return seen
