"""What routes a model makes, from its config alone: it is built without weights, and its routers are looked up."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_replay.errors import ConfigError
from moe_replay.routing.discovery import find_routers


class RouterShape(NamedTuple):
    """The routers of a model."""

    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    num_experts: int
    top_k: int
    decoder_layers: int
    """All layers, dense ones included."""


def router_shape(folder: Path) -> RouterShape:
    """The routers of the model whose config.json lies in `folder`; no weights are read, no code of the model's is run.

    Raises ConfigError when there is no such config on this machine, it needs code of the model's own, or the model is
    dense or of a family that can't be replayed.
    """
    try:
        model = empty_model(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}, or give --layers and --experts") from error
    routers = find_routers(model)[1]
    layers = tuple(router.layer for router in routers)
    decoder_layers = int(model.config.get_text_config().num_hidden_layers)
    return RouterShape(layers, routers[0].num_experts, routers[0].top_k, decoder_layers)


def model_config(folder: Path) -> Any:
    """transformers' config of the model in `folder`, with its family's defaults; raises as `empty_model`."""
    with _told_of(folder):
        # Unless told otherwise, the library asks the user whether to run the model's code, and asks the hub for names.
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def empty_model(folder: Path) -> Any:
    """The model whose config.json lies in `folder`, without memory for its weights.

    Raises ConfigError when there is no such config on this machine, or it needs code of the model's own.
    """
    config = model_config(folder)
    with _told_of(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder} gives no model that can be built ({type(error).__name__}); name a folder with the config.json "
            "of a model that transformers knows without code of the model's own"
        ) from error
