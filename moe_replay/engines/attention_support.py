"""Which implementations of attention a model's family has in transformers, told before a run starts."""

from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moe_replay.errors import ConfigError
from moe_replay.routing.model_shape import model_config
from moe_replay.sections import TrainingConfig


def require_attention_support(folder: Path, training: TrainingConfig) -> None:
    """Refuse `training.attention` where transformers' family of the model in `folder` says that it does not have it.

    Nothing is built, and what the machine has is not looked at. Raises ConfigError with what the family has instead;
    or as `model_config`.
    """
    family = _family(folder)
    if family is None or _supports(family, training.attention):
        return
    other = "sdpa" if training.attention == "flash_attention_2" else "flash_attention_2"
    if _supports(family, other):
        kernels = getattr(family, "_compatible_flash_implementations", None) if other == "flash_attention_2" else None
        taken = f", in place of which this family takes {' or '.join(kernels)}" if kernels else ""
        way_out = f"set training.attention = {other!r}{taken}, or choose another model"
    else:
        way_out = f"nor has it {other!r}, so that it can't be trained here: choose another model"
    raise ConfigError(
        f"training.attention = {training.attention!r} is nothing that transformers' {family.__name__} has; {way_out}"
    )


def _family(folder: Path) -> Any:
    """The class that verl loads the model as, or none where transformers names none."""
    kind = type(model_config(folder))
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    return next((mapping[kind] for mapping in mappings if kind in mapping), None)


def _supports(family: Any, attention: str) -> bool:
    return bool(family._supports_sdpa if attention == "sdpa" else family._supports_flash_attn)
