"""Checkpoints of verl's Megatron engine without pickle: Hugging Face weights, and the optimizer's state beside them.

The weights are what mbridge exports, under the names and in the shapes of the model that training began with, so that
vLLM, predictors and either training engine load them. The optimizer's state is of Megatron's own parameters, which fuse
some of those: it is for the Megatron engine alone, but for any number of ranks, since parameters are named by the layer
and the expert that they are of in the whole model. Where they are bfloat16 their float32 originals are kept too.
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
from moe_replay.engines.optimizer_folder import OPTIMIZER_FOLDERS, optimizer_folder
from moe_replay.engines.tensor_files import read_tensors, write_tensors
from moe_replay.engines.to_first_rank import on_first_rank
from moe_replay.errors import ArchiveCorrupt

_SCALARS = "scalars.json"
_ORIGINAL = "parameter"
"""Slot of a bfloat16 parameter's float32 original."""


class MegatronCheckpoint:
    """Of an engine; all ranks save and load together, and the first writes."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._is_first = torch.distributed.get_rank() == 0

    def save(self, folder: Path) -> None:
        """Write `huggingface/` (weights in the model's precision) and `megatron_optimizer/` under `folder`."""
        engine = self._engine
        exported = engine.bridge.export_weights(engine.module)  # by all ranks together
        weights = {name: tensor.detach().cpu() for name, tensor in exported if self._is_first}
        own = {f"{one.name}/{slot}": value for one in self._kept() for slot, value in one.slots.items()}
        state = on_first_rank(own)
        if self._is_first:
            model = folder / MODEL_FOLDER
            write_tensors(model, "model", weights)
            for described in (engine.model_config.hf_config, engine.model_config.get_processor()):
                described.save_pretrained(model)
            if (generation := engine.model_config.generation_config) is not None:
                generation.save_pretrained(model)
            write_tensors(folder / OPTIMIZER_FOLDERS["megatron"], "optimizer", state)
            counted = next((group["step"] for group in self._groups if "step" in group), None)
            document = {"steps": engine.lr_scheduler.num_steps, "step_of_groups": counted}
            (folder / OPTIMIZER_FOLDERS["megatron"] / _SCALARS).write_text(json.dumps(document, sort_keys=True))
        torch.distributed.barrier()

    def load(self, folder: Path) -> None:
        """Restore the optimizer and the position in the schedule; weights are loaded when the engine is built.

        Learning rate, warm-up, betas and weight decay stay those that the engine was built with: a fork may have been
        given others.

        Raises:
            ConfigError: the checkpoint was trained by the FSDP2 engine.
            ArchiveCorrupt: the state is not that of this model's parameters.
        """
        state = optimizer_folder(folder, "megatron")
        scalars = json.loads((state / _SCALARS).read_text())
        if scalars["steps"]:  # else there is nothing to keep
            self._restore(state)
        # Transformer Engine counts steps by group, torch by parameter.
        for group in self._groups if scalars["step_of_groups"] is not None else []:
            group["step"] = scalars["step_of_groups"]
        scheduler = self._engine.lr_scheduler
        scheduler.num_steps = 0
        scheduler.step(scalars["steps"])

    def _restore(self, folder: Path) -> None:
        kept = {one.name: one for one in self._kept()}
        stored: dict[str, dict[str, Tensor]] = {}
        for key, value in read_tensors(folder, lambda key: key.rsplit("/", 1)[0] in kept):
            name, slot = key.rsplit("/", 1)
            stored.setdefault(name, {})[slot] = value
        shapes = {name: slots["exp_avg"].shape for name, slots in stored.items() if "exp_avg" in slots}
        unlike = [name for name, one in kept.items() if shapes.get(name) != one.parameter.shape]
        if unlike:
            raise ArchiveCorrupt(
                f"the optimizer state in {folder} does not fit {len(unlike)} of this rank's {len(kept)} parameters, "
                f"{unlike[0]} among them; resume with the model the run was started with"
            )
        for name, slots in stored.items():
            kept[name].restore(slots)

    def _kept(self) -> Iterator["_Kept"]:
        """All parameters of this rank, each with the optimizer that has it: one for the experts, one for the rest."""
        whole = self._engine.optimizer
        optimizers = [one.optimizer for one in getattr(whole, "chained_optimizers", [whole])]
        groups = [(optimizer, group) for optimizer in optimizers if optimizer for group in optimizer.param_groups]
        owners = {id(held): optimizer for optimizer, group in groups for held in group["params"]}
        for chunk in unwrap_model(self._engine.module):
            names = self._engine.bridge._weight_name_mapping_mcore_local_to_global(chunk)
            for name, parameter in chunk.named_parameters():
                held = getattr(parameter, "main_param", parameter)
                yield _Kept(names[name], parameter, held, owners[id(held)])

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups


@dataclass(frozen=True)
class _Kept:
    """A parameter as the optimizer keeps it."""

    name: str
    """In the whole model."""
    parameter: Tensor
    held: Tensor
    """What is updated: the parameter, or its float32 original."""
    optimizer: torch.optim.Optimizer

    @property
    def slots(self) -> dict[str, Tensor]:
        """What is kept of it; nothing before the first step."""
        slots = {slot: torch.as_tensor(value) for slot, value in self.optimizer.state.get(self.held, {}).items()}
        return slots | ({_ORIGINAL: self.held.data} if slots and self.held is not self.parameter else {})

    def restore(self, slots: dict[str, Tensor]) -> None:
        """Keep these from now on."""
        if _ORIGINAL in slots:
            self.held.data.copy_(slots.pop(_ORIGINAL))
        # torch keeps an optimizer's count of steps on the CPU, wherever its parameters are.
        placed = {slot: value if slot == "step" else value.to(self.held.device) for slot, value in slots.items()}
        self.optimizer.state[self.held] = placed
