"""How vLLM takes weights from verl's trainer on a CPU; runs in vLLM's worker (`verl_ppo.py`)."""

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from moe_replay.engines.policy_loader import pack_experts


class Reload(vLLMColocateWorkerExtension):
    """verl loads into tensors that vLLM's CPU kernels have packed away; vLLM's own reload puts them back first."""

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Take the weights that verl sends through shared memory."""
        worker: Any = self
        received: list[tuple[str, torch.Tensor]] = []
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), torch.device("cpu"), use_shm)
        # The sender's buffer is used again.
        receiver.receive_weights(lambda weights, is_last: received.extend((name, one.clone()) for name, one in weights))
        worker.reload_weights(weights_iterator=iter(received))
        pack_experts(worker.model_runner.get_model())
