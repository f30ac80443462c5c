"""Where a checkpoint keeps the optimizer's state, which is of the training engine that wrote it."""

from pathlib import Path

from moe_replay.errors import ConfigError

OPTIMIZER_FOLDERS = {"fsdp2": "optimizer", "megatron": "megatron_optimizer"}
"""By `training.engine`."""


def optimizer_folder(checkpoint: Path, engine: str) -> Path:
    """The folder of the engine's state in a checkpoint; raises ConfigError where another engine wrote that."""
    folder = checkpoint / OPTIMIZER_FOLDERS[engine]
    if not folder.is_dir():
        (other,) = OPTIMIZER_FOLDERS.keys() - {engine}
        raise ConfigError(
            f"{checkpoint} holds no optimizer state of training.engine = {engine!r}: it was trained by {other!r}; go "
            "on with that, or start a new run from its weights (huggingface/)"
        )
    return folder
