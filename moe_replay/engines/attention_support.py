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
        way_out = f"set training.attention = {other!r}{_replaced(kernels)}, or choose another model"
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


def _replaced(kernels: list[str] | None) -> str:
    """What transformers takes in place of `flash_attention_2` in families that name `kernels` of their own."""
    if not kernels or "flash_attention_2" in kernels:
        return ""
    # `PreTrainedModel._check_and_adjust_attn_implementation` takes the first, and fails without the package.
    return (
        f" (transformers takes {kernels[0]!r} in its place here: a machine that trains needs the package kernels too, "
        "which fetches that from the Hugging Face Hub)"
    )


def _supports(family: Any, attention: str) -> bool:
    return bool(family._supports_sdpa if attention == "sdpa" else family._supports_flash_attn)
