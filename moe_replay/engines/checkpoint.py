"""Checkpoints without pickle: Hugging Face weights that any engine loads, and the optimizer's state beside them.

verl writes and reads its shards with `torch.save` and `torch.load(weights_only=False)`, which runs whatever code a
stored file holds. This manager takes the place of verl's behind the engine's own `save_checkpoint` and
`load_checkpoint`, and keeps verl's for the model's config and tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from moe_replay.archive.layout import MODEL_FOLDER
from moe_replay.engines.adapters import ADAPTERS_FOLDER, is_adapted, merged_weights, read_adapters, write_adapters
from moe_replay.engines.optimizer_folder import OPTIMIZER_FOLDERS, optimizer_folder
from moe_replay.engines.tensor_files import read_tensors, write_tensors
from moe_replay.errors import ArchiveCorrupt

_SCALARS = "scalars.json"
_ATTENTION = "sdpa"


class SafetensorsCheckpointManager(FSDPCheckpointManager):
    """Saves a checkpoint whole and independent of the number of ranks; rank 0 writes."""

    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Write `huggingface/` (weights in the trainer's precision) and `optimizer/` under `local_path`.

        Where adapters are trained their sum with the weights is in `huggingface/`, and they are in `adapters/`.
        """
        assert not self.checkpoint_save_contents, "verl's own shards are pickles: save_contents must be empty"
        super().save_checkpoint(local_path, global_step=global_step)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=whole)
        state = {"state": {}, "param_groups": []}
        # Asked for the state of an optimizer that took no step, torch makes one by a step of its own, and counts it.
        if self.optimizer.state:
            state = get_optimizer_state_dict(self.model, self.optimizer, options=whole)
        if self.rank == 0:
            model: Any = self.model
            if is_adapted(model):
                write_adapters(Path(local_path) / ADAPTERS_FOLDER, model, weights)
                model, weights = model.get_base_model(), merged_weights(model, weights)
            # transformers undoes its own renaming and fusing of experts, for every family it can load.
            model.save_pretrained(Path(local_path) / MODEL_FOLDER, state_dict=weights)
            _name_attention_anew(Path(local_path) / MODEL_FOLDER / "config.json")
            _write_optimizer(Path(local_path) / OPTIMIZER_FOLDERS["fsdp2"], state, self.lr_scheduler.state_dict())
        torch.distributed.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Restore optimizer and scheduler, and adapters where they are trained.

        The weights are loaded when the engine is built: from `huggingface/`, or for adapters from the model that they
        are trained beside.

        Moments and the position in the schedule are the checkpoint's. Learning rate, warm-up, betas and weight decay
        stay those that the engine was built with: a fork may have been given others.

        Raises:
            ArchiveCorrupt: the state is not that of this model's parameters.
            ConfigError: adapters were trained under other settings, or where now there are none; or the checkpoint was
                trained by the Megatron engine.
        """
        read_adapters(Path(local_path) / ADAPTERS_FOLDER, self.model, reads=self.rank == 0)
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        base_lrs = self.lr_scheduler.base_lrs
        folder = optimizer_folder(Path(local_path), "fsdp2")
        scalars = json.loads((folder / _SCALARS).read_text())
        # The first rank alone reads the moments, and hands each of the others its shard.
        state = _read_state(folder, scalars["param_groups"]) if self.rank == 0 else {}
        try:
            if scalars["param_groups"]:  # else it took no step
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state, options=options)
        except (KeyError, RuntimeError, ValueError) as error:
            covered = len(state.get("state", {}))
            raise ArchiveCorrupt(
                f"the optimizer state in {local_path} covers {covered} parameters and does not fit this "
                f"model ({error}); resume with the model the run was started with"
            ) from error
        self.lr_scheduler.load_state_dict(scalars["scheduler"] | {"base_lrs": base_lrs})
        # Each of verl's schedules multiplies the learning rate by a function of the step.
        assert isinstance(self.lr_scheduler, LambdaLR)
        factors = [factor(self.lr_scheduler.last_epoch) for factor in self.lr_scheduler.lr_lambdas]
        for group, configured, base_lr, factor in zip(self._groups, settings, base_lrs, factors, strict=True):
            group.update(configured | {"lr": base_lr * factor})
        torch.distributed.barrier()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def _name_attention_anew(config_file: Path) -> None:
    """Have the config ask for attention that any machine has, not for that of the ranks which trained."""
    config = json.loads(config_file.read_text())
    if config.get("attn_implementation", _ATTENTION) != _ATTENTION:
        document = json.dumps(config | {"attn_implementation": _ATTENTION}, indent=2, sort_keys=True)
        config_file.write_text(document + "\n")  # as transformers lays it out


def _write_optimizer(folder: Path, state: dict[str, Any], scheduler: dict[str, Any]) -> None:
    tensors = {
        f"{parameter}/{slot}": torch.as_tensor(value)
        for parameter, slots in state["state"].items()
        for slot, value in slots.items()
    }
    write_tensors(folder, "optimizer", tensors)
    document = {"param_groups": state["param_groups"], "scheduler": scheduler}
    (folder / _SCALARS).write_text(json.dumps(document, sort_keys=True))


def _read_state(folder: Path, param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in read_tensors(folder):
        parameter, slot = key.rsplit("/", 1)
        state.setdefault(parameter, {})[slot] = value
    return {"state": state, "param_groups": param_groups}
