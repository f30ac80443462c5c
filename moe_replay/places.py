"""Where a run lies, and how commands name it."""

import os
from pathlib import Path

from moe_replay.config import RunConfig
from moe_replay.config_reading import parse_config


def home_folder() -> Path:
    """MOE_REPLAY_HOME, by default `.moe-replay` in the working folder: runs, databases, caches, logs."""
    return Path(os.environ.get("MOE_REPLAY_HOME") or ".moe-replay").expanduser().absolute()


def is_hub_name(model: str) -> bool:
    """Whether a model that is no folder can be meant as one of the hub, `owner/model`."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")


def as_argument(run_id: str, root: str | None) -> str:
    """The run as a command has to name it; `root` is `storage.root`, none for the default."""
    return f"{run_id} --root {root}" if root else run_id


def run_root(config: RunConfig) -> str:
    """The URL under which the run's folder lies. Raises ConfigError when MOE_REPLAY_ROOT can't be one."""
    if root := config.storage.root or os.environ.get("MOE_REPLAY_ROOT"):
        return parse_config({"storage": {"root": root}}).storage.root or root
    return (home_folder() / "runs").as_uri()
