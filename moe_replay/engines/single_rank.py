"""The training of one rank, in the process that asks for it: no port, no Ray."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch._C._distributed_c10d import HashStore

from moe_replay.engines.ranks import RouterShape
from moe_replay.engines.verl_settings import worker_config
from moe_replay.sections import ResourcesConfig, TrainingConfig


class SingleRank:
    """verl's engine in this process (a `moe_replay.engines.ranks.Ranks`)."""

    def __init__(self, training: TrainingConfig, resources: ResourcesConfig):
        if not torch.cuda.is_available():
            os.environ.setdefault("VERL_PLATFORM", "cpu")
        import verl  # noqa: F401 (chooses the platform and loads our plugin, before any engine is imported)

        _join_process_group()
        self._settings = training, resources
        self.engine: Any = None

    def build(self, model: Path) -> RouterShape:
        """An engine around the model, with a fresh optimizer."""
        from verl.workers.engine import EngineRegistry

        # The old engine goes first: two of them would double the peak of memory.
        self.engine = None
        gc.collect()
        config = worker_config(model, *self._settings)
        self.engine = EngineRegistry.new(
            model_type=config.model_type,
            backend=config.engine_config.strategy,
            model_config=config.model_config,
            engine_config=config.engine_config,
            optimizer_config=config.optimizer_config,
            checkpoint_config=config.checkpoint_config,
        )
        self.engine.initialize()
        return self.engine.router_shape

    def restore(self, folder: Path) -> None:
        """Optimizer and scheduler of a checkpoint whose model was built."""
        self.engine.load_checkpoint(str(folder))

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        self.engine.save_checkpoint(str(folder))

    def score(self, batch: TensorDict) -> dict[str, Any]:
        """verl's output of a pass without gradient."""
        return self.engine.score(batch)

    def step(self, batch: TensorDict) -> dict[str, Any]:
        """verl's output of an optimizer step."""
        return self.engine.step(batch)


def _join_process_group() -> None:
    """A process group of one, without a port."""
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
