"""One rank of training under Ray: verl's `TrainingWorker` around our engine.

What is changed of verl's worker, and why:
- A CPU's process group is plain gloo: verl asks for a backend of the CPU twice, which torch refuses.
- `train_batch` returns what the pass saw, and takes loss and learning rate from the batch: verl's drops the model's
  output.
- Outputs are not reduced by verl's means, which gloo has not, nor measured by a device's memory, which a CPU has not.
"""

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine_workers import TrainingWorker

from moe_replay.engines.ranks import RouterShape
from moe_replay.engines.verl_settings import model_config, worker_config
from moe_replay.sections import ResourcesConfig, TrainingConfig

_ON_ALL_RANKS: Any = Dispatch["ONE_TO_ALL"]


class ReplayWorker(TrainingWorker):
    """Holds this rank's shard of the model; `RayRanks` calls its methods on all ranks at once."""

    engine: Any

    def __init__(self, model: Path, training: TrainingConfig, resources: ResourcesConfig):
        if get_device_name() == "cpu":
            torch.distributed.init_process_group("gloo")
        self._settings = training, resources
        super().__init__(worker_config(model, *self._settings))

    @register(dispatch_mode=_ON_ALL_RANKS, blocking=False)
    def build(self, model: Path) -> RouterShape:
        """See `Ranks.build`."""
        # What was built before goes first: two of them would double the peak of memory.
        self.engine.release()
        self.engine.model_config = model_config(model, *self._settings)
        self.reset()
        return self.engine.router_shape

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """One optimizer step of all ranks, each on its share of the batch; the first that has a share answers."""
        output = self.engine.step(data)
        return self._postprocess_output(output).cpu() if self.engine.is_mp_src_rank_with_outputs() else None

    def _postprocess_output(self, output: dict[str, Any], **_: Any) -> TensorDict:
        """This rank's part of the output, with the loss and the gradient's norm of all ranks."""
        # Each rank's loss is normalised over the batch of all and scaled by their number, so that the mean of gradients
        # is the gradient of the sum.
        loss = torch.tensor(float(sum(output["loss"])), device=get_device_name())
        torch.distributed.all_reduce(loss, group=self.engine.get_data_parallel_group())
        metrics = {
            "loss": loss.item() / self.engine.get_data_parallel_size(),
            "grad_norm": float(output["metrics"].get("grad_norm", 0.0)),
        }
        return tu.get_tensordict(tensor_dict=output["model_output"], non_tensor_dict={"metrics": metrics})
