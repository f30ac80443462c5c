"""verl's Megatron engine, with routes replayed by verl itself and recorded here (model type `replayed_language_model`).

Batches, and what comes back of them, are those of `replay_engine`, with two differences: the last row of a sequence is
routed live under replay too, since verl gives it no route; and a batch with `gate_predictor` is refused. Micro-batches
are packed. Needs the extra `megatron`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.megatron.router_replay_patch import RouterReplay
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from moe_replay.engines.megatron_checkpoint import MegatronCheckpoint
from moe_replay.engines.megatron_replay import MegatronRouters, require_whole_routes
from moe_replay.engines.observed_passes import MODEL_TYPE, ObservedPasses
from moe_replay.engines.row_layout import PackedRows
from moe_replay.errors import ConfigError

_MegatronEngine: Any = MegatronEngineWithLMHead  # verl's registering decorator hides its class from type checkers


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device=["cpu", "cuda"])
class MegatronReplayEngine(ObservedPasses, _MegatronEngine):
    """Replays experts where the batch says so, else routes live; records the live choice always."""

    routers: MegatronRouters

    def initialize(self) -> None:
        """Build model and optimizer as verl does, then find the routers of the live model."""
        # verl's worker names the engine here, by what the engine itself looks up how to read the model.
        self.model_config.model_type = "language_model"
        super().initialize()
        self.routers = MegatronRouters(unwrap_model(self.module))

    def release(self) -> None:
        """Let go of model and optimizer, and of the routers that verl lists for the whole process."""
        super().release()
        self.checkpoint_mananager = None  # verl's name
        RouterReplay.router_instances.clear()

    def save_checkpoint(self, local_path: str, **_: Any) -> None:
        """Write what `MegatronCheckpoint` says; verl's own would be pickles."""
        MegatronCheckpoint(self).save(Path(local_path))

    def load_checkpoint(self, local_path: str, **_: Any) -> None:
        """Take optimizer and schedule of a checkpoint; raises as `MegatronCheckpoint.load`."""
        MegatronCheckpoint(self).load(Path(local_path))

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """As verl's, under the batch's routes if it has any."""
        given = data.keys()
        if "gate_predictor" in given:
            raise ConfigError(
                "a pass under a predictor routes by h (W + W_p), which verl's Megatron engine does not; take a run of "
                "training.engine = 'fsdp2' for predictions by the trainer (method.route_source = 'old_log_prob', "
                "counterfactual replay), or PR2, whose rollout is what predicts"
            )
        replays = "routed_experts" in given
        if replays:
            require_whole_routes(data["routed_experts"])
        tu.assign_non_tensor(data, enable_routing_replay=replays)
        try:
            return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self.routers.forget()

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: Any,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Any,
    ) -> Any:
        """One micro-batch through the model, watched."""
        micro_batch = next(batch_iter)
        input_ids: Any = micro_batch["input_ids"]
        rows = PackedRows(len(input_ids.values()))
        self._observe(micro_batch, rows)
        output, postprocess = super().forward_step(
            iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func
        )
        return output | self._seen(micro_batch, rows), postprocess
