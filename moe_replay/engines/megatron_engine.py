"""verl's Megatron engine, with routes replayed by verl itself and recorded here (model type `replayed_language_model`).

Batches, and what comes back of them, are those of `replay_engine`, with two differences: the last row of a sequence is
routed live under replay too, since verl gives it no route; and there is no `gate_predictor`. Batches that ask for more
(`require_megatron_pass`) must not come here. Micro-batches are packed. Needs the extra `megatron`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.megatron.router_replay_patch import RouterReplay
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from moe_replay.engines.megatron_checkpoint import MegatronCheckpoint
from moe_replay.engines.megatron_replay import MegatronRouters, moe_layers
from moe_replay.engines.megatron_stages import StageObservation
from moe_replay.engines.observed_passes import MODEL_TYPE, ObservedPasses
from moe_replay.engines.ranks import RouterShape
from moe_replay.engines.row_layout import PackedRows, RowLayout

_MegatronEngine: Any = MegatronEngineWithLMHead  # verl's registering decorator hides its class from type checkers


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device=["cpu", "cuda"])
class MegatronReplayEngine(ObservedPasses, _MegatronEngine):
    """Replays experts where the batch says so, else routes live; records the live choice always."""

    routers: MegatronRouters
    tf_config: Any
    _told: StageObservation
    """What the routers of this rank have told of the batch at work."""

    def initialize(self) -> None:
        """Build model and optimizer as verl does, then find the routers of the live model."""
        # verl's worker names the engine here, by what the engine itself looks up how to read the model.
        self.model_config.model_type = "language_model"
        super().initialize()
        self.routers = MegatronRouters(unwrap_model(self.module))

    @property
    def router_shape(self) -> RouterShape:
        """Of the whole model, of which this rank may have a stage."""
        return super().router_shape._replace(layers=moe_layers(self.tf_config))

    def release(self) -> None:
        """Let go of model and optimizer, and of the routers that verl lists for the whole process."""
        super().release()
        self.checkpoint_mananager = None  # verl's name
        RouterReplay.router_instances.clear()

    def save_checkpoint(self, local_path: str, *_: Any, **__: Any) -> None:
        """Write what `MegatronCheckpoint` says; verl's own would be pickles."""
        MegatronCheckpoint(self).save(Path(local_path))

    def load_checkpoint(self, local_path: str, *_: Any, **__: Any) -> None:
        """Take optimizer and schedule of a checkpoint; raises as `MegatronCheckpoint.load`."""
        MegatronCheckpoint(self).load(Path(local_path))

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """As verl's, under the batch's routes if it has any."""
        tu.assign_non_tensor(data, enable_routing_replay="routed_experts" in data.keys())  # noqa: SIM118 (no dict)
        data["place"] = torch.arange(len(data))
        self._told = StageObservation()
        try:
            output = super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self.routers.forget()
        seen = self._told.of_all_stages(self.tf_config)
        if self.is_mp_src_rank_with_outputs():
            output["model_output"] |= seen
        return output

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: Any,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Any,
    ) -> Any:
        """One micro-batch through the layers of this rank, watched."""
        micro_batch = next(batch_iter)
        input_ids: Any = micro_batch["input_ids"]
        rows = PackedRows(len(input_ids.values()))
        self._observe(micro_batch, rows)
        given = iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func
        result = super().forward_step(*given)
        self._told.add(micro_batch["place"], self._seen(micro_batch, rows))
        return result

    def _routes_here(self, nested: Any, rows: RowLayout) -> tuple[Tensor, Tensor]:
        ids_RLK, present_R = super()._routes_here(nested, rows)
        places = [self.router_shape.layers.index(layer) for layer in self.routers.layers]
        return ids_RLK[:, places], present_R
