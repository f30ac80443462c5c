"""The Ray cluster that ranks run on: the one that RAY_ADDRESS names, else one of this machine alone.

A cluster of our own ends with the process that started it, however that ends: Ray has the kernel tell its daemons.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moe_replay.config import home_folder
from moe_replay.errors import ConfigError

_LONGEST_FOLDER = 40
"""Bytes. A socket's path may have 107, and Ray's own part of it has up to 66."""


class RayCluster:
    """A connection of this process; one at a time, as Ray has it."""

    def __init__(self, ranks: int):
        """Raises ConfigError when there is no cluster at RAY_ADDRESS, or one without a GPU, or CPU, for each rank."""
        import ray

        self._session: Path | None = None
        quiet: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": True}
        address = os.environ.get("RAY_ADDRESS")
        if address:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"no Ray cluster answers at RAY_ADDRESS = {address} ({error}); start it (ray start --head), or "
                    "unset RAY_ADDRESS to have one on this machine for the run"
                ) from error
        else:
            # A secret of its own, or Ray would write one into the user's home.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            folder = _folder()
            started = ray.init(
                address="local",
                num_cpus=ranks,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **quiet,
            )
            self._session = Path(started.address_info["session_dir"])
            _remove_sessions_of_the_dead(folder)
        self.device = _device(ray.cluster_resources(), ranks, address)
        """What the ranks compute on: `GPU` or `CPU`."""

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        ray.shutdown()
        if self._session:
            shutil.rmtree(self._session, ignore_errors=True)


def _device(there: dict[str, float], ranks: int, address: str | None) -> str:
    device = "GPU" if there.get("GPU") and os.environ.get("VERL_PLATFORM") != "cpu" else "CPU"
    if (number := int(there.get(device, 0))) < ranks:
        where = f"the Ray cluster at {address}" if address else "this machine"
        raise ConfigError(
            f"resources.training_world_size = {ranks} takes a {device} for each rank, and {where} has {number}; lower "
            "it, or give a larger cluster in RAY_ADDRESS"
        )
    return device


def _folder() -> Path:
    """Where Ray keeps sockets and logs: below MOE_REPLAY_HOME, unless no socket's path would be short enough there."""
    folder = home_folder() / "ray"
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        folder = Path(tempfile.gettempdir()) / f"moe-replay-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _remove_sessions_of_the_dead(folder: Path) -> None:
    """Ray keeps what a killed driver's session wrote; its name ends with the driver's process id."""
    for session in folder.glob("session_*_*"):
        process = session.name.rpartition("_")[2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(session, ignore_errors=True)
