"""verl's FSDP2 engine, with routes recorded and replayed (registered as model type `replayed_language_model`).

Legend of shapes: B sequences of a micro-batch, S tokens of its longest, R = B * S rows that reach a router,
L MoE layers, K experts per token.

Routes travel inside the batch as verl's `routed_experts`: nested [B, tokens, L, K], -1 in rows without a route.
verl's micro-batching reorders sequences, so targets are built from the micro-batch itself, in the layout that
the model is about to see. The routers' own choices come back as `live_experts` in the model's output, in that layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from moe_replay.engines.checkpoint import SafetensorsCheckpointManager
from moe_replay.routing.routers import Routers

MODEL_TYPE = "replayed_language_model"
NO_ROUTE = -1
"""Fills the rows of `routed_experts` that have no route; they are routed live."""


_FSDPEngine: Any = FSDPEngineWithLMHead  # verl's registering decorator hides its class from type checkers


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cpu", "cuda", "npu"])
class ReplayEngine(_FSDPEngine):
    """Replays `routed_experts` where the batch has it, else routes live; records the live choice always.

    Needs `use_remove_padding=False`: rows are matched to tokens in the padded layout.
    """

    routers: Routers

    def initialize(self) -> None:
        """Build model and optimizer as verl does, then find the routers of the live, sharded model."""
        super().initialize()
        self.routers = Routers(self.module)
        self.checkpoint_manager = SafetensorsCheckpointManager(
            model=self.module,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            processing_class=self.model_config.get_processor(),
            checkpoint_config=self.checkpoint_config,
        )

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """As verl's; targets outlive each forward, since recompute meets them again in backward, but not the batch."""
        try:
            return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self.routers.route_live()

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool) -> Any:
        """One micro-batch through the model under its own routes."""
        input_ids: Any = micro_batch["input_ids"]
        lengths_B = input_ids.offsets().diff()
        real_R = (torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]).reshape(-1)
        if "routed_experts" in micro_batch.keys():  # noqa: SIM118 (a TensorDict is no dict)
            routed_experts: Any = micro_batch["routed_experts"]
            ids_RLK, present_R = padded_routes(routed_experts.values(), real_R)
            self.routers.replay(ids_RLK.to(get_device_id()), present_R.to(get_device_id()))
        else:
            self.routers.route_live()
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        live_TLK = self.routers.live_RLK[real_R.to(get_device_id())].to(torch.int32)
        output["model_output"]["live_experts"] = torch.nested.nested_tensor_from_jagged(
            live_TLK, input_ids.offsets().to(live_TLK.device)
        )
        return loss, output


def padded_routes(ids_TLK: Tensor, real_R: Tensor) -> tuple[Tensor, Tensor]:
    """Spread the routes of real tokens over the rows of the padded batch.

    Returns int64 ids [R, L, K] and, per row, whether it has a route: padding and rows of `NO_ROUTE` have none.
    """
    ids_RLK = torch.full((real_R.numel(), *ids_TLK.shape[1:]), NO_ROUTE, dtype=torch.int64, device=ids_TLK.device)
    ids_RLK[real_R] = ids_TLK.to(torch.int64)
    present_R = (ids_RLK != NO_ROUTE).all(-1).all(-1)
    return ids_RLK.clamp_min(0), present_R
