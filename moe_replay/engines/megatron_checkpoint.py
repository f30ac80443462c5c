"""Checkpoints of verl's Megatron engine without pickle: Hugging Face weights, and the optimizer's state beside them.

The weights are what mbridge exports, under the names and in the shapes of the model that training began with, so that
vLLM, predictors and either training engine load them. The optimizer's state is of Megatron's own parameters, which fuse
some of those: it is for the Megatron engine alone. Where parameters are bfloat16 their float32 originals are kept too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.utils.megatron_utils import unwrap_model

from moe_replay.archive.layout import MODEL_FOLDER
from moe_replay.engines.tensor_files import read_tensors, write_tensors
from moe_replay.errors import ArchiveCorrupt, ConfigError

OPTIMIZER_FOLDER = "megatron_optimizer"
_SCALARS = "scalars.json"
_ORIGINAL = "parameter"
"""Slot of a bfloat16 parameter's float32 original."""


class MegatronCheckpoint:
    """Of an engine on one rank."""

    def __init__(self, engine: Any):
        self._engine = engine

    def save(self, folder: Path) -> None:
        """Write `huggingface/` (weights in the model's precision) and `megatron_optimizer/` under `folder`."""
        engine = self._engine
        weights = {name: tensor.detach().cpu() for name, tensor in engine.bridge.export_weights(engine.module)}
        model = folder / MODEL_FOLDER
        write_tensors(model, "model", weights)
        engine.model_config.hf_config.save_pretrained(model)
        engine.model_config.get_processor().save_pretrained(model)
        if (generation := engine.model_config.generation_config) is not None:
            generation.save_pretrained(model)
        state = {
            f"{name}/{slot}": torch.as_tensor(value).cpu()
            for name, slots in ((one.name, one.slots) for one in self._kept())
            for slot, value in slots.items()
        }
        write_tensors(folder / OPTIMIZER_FOLDER, "optimizer", state)
        document = {"steps": engine.lr_scheduler.num_steps, "group_steps": [g.get("step") for g in self._groups]}
        (folder / OPTIMIZER_FOLDER / _SCALARS).write_text(json.dumps(document, sort_keys=True))

    def load(self, folder: Path) -> None:
        """Restore the optimizer and the position in the schedule; weights are loaded when the engine is built.

        Learning rate, warm-up, betas and weight decay stay those that the engine was built with: a fork may have been
        given others.

        Raises:
            ConfigError: the checkpoint was trained by the FSDP2 engine.
            ArchiveCorrupt: the state is not that of this model's parameters.
        """
        state = folder / OPTIMIZER_FOLDER
        if not state.is_dir():
            raise ConfigError(
                f"{folder} holds no optimizer state of training.engine = 'megatron': it was trained by 'fsdp2'; go "
                "on with that, or start a new run from its weights (huggingface/)"
            )
        scalars = json.loads((state / _SCALARS).read_text())
        stored = _by_parameter(state)
        kept = {one.name: one for one in self._kept()}
        expected = {name: one.parameter.shape for name, one in kept.items()}
        found = {name: slots["exp_avg"].shape for name, slots in stored.items() if "exp_avg" in slots}
        groups = scalars["group_steps"]
        if (stored and found != expected) or len(groups) != len(self._groups):
            raise ArchiveCorrupt(
                f"the optimizer state in {state} covers {len(found)} parameters in {len(groups)} groups and does not "
                f"fit this model's {len(expected)} in {len(self._groups)}; resume with the model the run was started "
                "with"
            )
        for name, slots in stored.items():
            kept[name].restore(slots)
        for group, step in zip(self._groups, groups, strict=True):
            if step is not None:
                group["step"] = step
        scheduler = self._engine.lr_scheduler
        scheduler.num_steps = 0
        scheduler.step(scalars["steps"])

    def _kept(self) -> Iterator["_Kept"]:
        """All parameters of the model, each with the optimizer that has it: one for the experts, one for the rest."""
        whole = self._engine.optimizer
        optimizers = [one.optimizer for one in getattr(whole, "chained_optimizers", [whole])]
        groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
        owners = {id(held): optimizer for optimizer, group in groups for held in group["params"]}
        for number, chunk in enumerate(unwrap_model(self._engine.module)):
            for name, parameter in chunk.named_parameters():
                held = getattr(parameter, "main_param", parameter)
                yield _Kept(f"{number}.{name}", parameter, held, owners[id(held)])

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups


@dataclass(frozen=True)
class _Kept:
    """A parameter as the optimizer keeps it."""

    name: str
    parameter: Tensor
    held: Tensor
    """What is updated: the parameter, or its float32 original."""
    optimizer: torch.optim.Optimizer

    @property
    def slots(self) -> dict[str, Any]:
        """What is kept of it; nothing before the first step."""
        slots = dict(self.optimizer.state.get(self.held, {}))
        return slots | ({_ORIGINAL: self.held.data} if slots and self.held is not self.parameter else {})

    def restore(self, slots: dict[str, Tensor]) -> None:
        """Keep these from now on."""
        if _ORIGINAL in slots:
            self.held.data.copy_(slots.pop(_ORIGINAL))
        # torch keeps an optimizer's count of steps on the CPU, wherever its parameters are.
        placed = {slot: value if slot == "step" else value.to(self.held.device) for slot, value in slots.items()}
        self.optimizer.state[self.held] = placed


def _by_parameter(folder: Path) -> dict[str, dict[str, Tensor]]:
    stored: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder):
        name, slot = key.rsplit("/", 1)
        stored.setdefault(name, {})[slot] = value
    return stored
