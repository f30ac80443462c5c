"""LoRA adapters: which weights of a model get one, and what a policy that was trained with them consists of.

verl's FSDP2 engine builds them with peft, beside the weights of the model that the run starts from, and these stay as
they are. A checkpoint holds two things made of that: the merged weights, a plain Hugging Face model for whoever loads
the policy, and what was trained, from which training goes on. Weights are never merged in place, since taking an
adapter out again leaves another rounding behind.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForCausalLM

from moe_replay.engines.tensor_files import read_tensors, write_tensors
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.lora import EXPERTS, LINEAR, LoraConfig
from moe_replay.routing.discovery import find_routers, router_modules
from moe_replay.routing.model_shape import empty_model

ADAPTERS_FOLDER = "adapters"
"""Folder of a checkpoint with what was trained beside the model's weights."""
_SETTINGS_FILE = "adapters.json"
_ADAPTER = "default"
"""peft's name of the one adapter that a weight has."""
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of modules that peft, in families whose experts became one tensor, takes for those of the experts."""
_SEED = 0


class _Weight(NamedTuple):
    """A weight that can have an adapter."""

    kind: str
    is_module: bool
    """Whether it is that of a linear map, which peft adapts without computing the sum."""
    smallest: int
    """The smaller dimension of the map, or of each expert's."""


def adapter_settings(folder: Path, lora: LoraConfig) -> dict[str, Any]:
    """What verl's `HFModelConfig` of the model in `folder` is told of adapters; nothing where all weights are trained.

    Raises ConfigError when a target names no weight of the model, or the rank is above the dimensions of one.
    """
    if not lora.rank:
        return {}
    modules, parameters = adapted_paths(empty_model(folder), lora)
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": modules,
        "target_parameters": parameters,
        "lora": {"train_routers": lora.train_routers},  # which verl's FSDP engine hands on unread
    }


def adapted_paths(model: Any, lora: LoraConfig) -> tuple[list[str], list[str]]:
    """The weights of a transformers model that get an adapter, as peft's `target_modules` and `target_parameters`.

    Named by `all-linear`, or by names that it knows, peft 0.21 adapts the routers of most families too, whatever it is
    told to exclude; so each weight is named by its whole path, and by the way that leads to it.

    Raises as `adapter_settings`.
    """
    modules, parameters = [], []
    for path, weight in _chosen(model, lora).items():
        if not weight.is_module:
            parameters.append(path)
        elif path.split(".")[-1] in _TAKEN_FOR_EXPERTS:
            parameters.append(f"{path}.weight")
        else:
            modules.append(path)
    return modules, parameters


@contextmanager
def reproducible_start() -> Iterator[None]:
    """Adapters that are made inside start from the same numbers, whatever the process has drawn before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        yield


def train_routers(model: nn.Module) -> None:
    """Have the routers' own parameters trained beside the adapters."""
    for _, router in router_modules(model):
        router.requires_grad_(True)


def merged_weights(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights of the model without adapters that computes the same, from all of `weights`, which stay as they are.

    Args:
        model: the `PeftModel` that the engine holds, or its shard.
        weights: the whole state of that model.
    """
    from peft import PeftModel

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.get_base_model().config, trust_remote_code=False)
        whole: Any = PeftModel(empty, deepcopy(model.peft_config[_ADAPTER]))
    whole.load_state_dict(weights, assign=True)
    return whole.merge_and_unload(safe_merge=True).state_dict()  # safe_merge adds to copies


def write_adapters(folder: Path, model: Any, weights: dict[str, Any]) -> None:
    """Write what is trained of `model` into `folder`, from its whole state."""
    write_tensors(folder, "adapters", {name: weights[name] for name in _trained(model)})
    (folder / _SETTINGS_FILE).write_text(json.dumps(_settings(model), sort_keys=True))


def read_adapters(folder: Path, model: Any, reads: bool) -> None:
    """Put what was trained into `model`, whose other weights are those that it was trained beside.

    Called on all ranks; the one that `reads` hands each of the others its shard.

    Raises ConfigError when it was trained under other settings, ArchiveCorrupt when tensors are missing.
    """
    file = folder / _SETTINGS_FILE
    was, now = json.loads(file.read_text()) if file.is_file() else None, _settings(model) if is_adapted(model) else None
    if was != now:
        raise ConfigError(
            f"the checkpoint in {folder.parent} was trained with {_described(was)} and this run trains with "
            f"{_described(now)}: training.lora can't change from one to the other; start a run from the merged weights "
            "(--set model.path=.../checkpoint/huggingface)"
        )
    if now is None:
        return
    trained: dict[str, Any] = dict(read_tensors(folder)) if reads else {}
    if reads and (differing := sorted(trained.keys() ^ set(now["trained"]))):
        raise ArchiveCorrupt(
            f"{folder} holds {len(trained)} of the {len(now['trained'])} tensors that were trained, and they differ in "
            f"{', '.join(differing[:8])}: resume from an iteration before"
        )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, trained, options=options)


def is_adapted(model: nn.Module) -> bool:
    """Whether adapters are trained in the model."""
    return hasattr(model, "peft_config")


def _chosen(model: Any, lora: LoraConfig) -> dict[str, _Weight]:
    """The weights that get an adapter, by the path of their module, or their own where they are several experts'."""
    known = dict(_adaptable(model))
    chosen: dict[str, _Weight] = {}
    for target in lora.targets:
        found = {path: one for path, one in known.items() if target == one.kind or f".{path}".endswith(f".{target}")}
        if not found:
            ends = sorted({".".join(path.split(".")[-2:]) for path in known})
            raise ConfigError(
                f"training.lora.targets: no weight of the model's decoder layers ends in {target!r}; there are "
                f"{', '.join(ends)}, and {LINEAR} and {EXPERTS} for all of a kind"
            )
        chosen |= found
    narrowest = min(chosen, key=lambda path: chosen[path].smallest)
    if lora.rank > chosen[narrowest].smallest:
        raise ConfigError(
            f"training.lora.rank = {lora.rank} is above the smaller dimension of {narrowest}, "
            f"{chosen[narrowest].smallest}, so that its adapter would not be smaller than the weight: lower the rank, "
            "or leave that weight out of training.lora.targets"
        )
    return dict(sorted(chosen.items()))


def _adaptable(model: Any) -> Iterator[tuple[str, _Weight]]:
    """The weights of the decoder layers that can have an adapter: not those of routers, nor maps to a single number."""
    stack, _ = find_routers(model)
    routers = [path for path, _ in router_modules(model)]
    for path, module in model.named_modules():
        inside = path.removeprefix(f"{stack}.").split(".")
        is_router = any(f"{path}.".startswith(f"{router}.") for router in routers)
        if not path.startswith(f"{stack}.") or not any(map(str.isdigit, inside)) or is_router:
            continue
        if type(module) is nn.Linear and min(module.weight.shape) > 1:
            yield path, _Weight(EXPERTS if EXPERTS in inside else LINEAR, True, min(module.weight.shape))
        elif not isinstance(module, nn.Conv1d):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield f"{path}.{name}", _Weight(EXPERTS, False, min(parameter.shape[1:]))


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _settings(model: Any) -> dict[str, Any]:
    """What tells whether adapters fit a model, and mean the same in it."""
    config = model.peft_config[_ADAPTER]
    return {"rank": config.r, "alpha": config.lora_alpha, "trained": sorted(_trained(model))}


def _described(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "no adapters"
    return f"adapters of {len(settings['trained'])} tensors (rank {settings['rank']}, alpha {settings['alpha']})"
