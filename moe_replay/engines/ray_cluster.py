"""The Ray cluster that ranks and replicas run on: the one that RAY_ADDRESS names, else one of this machine alone.

A cluster of our own ends with the process that started it, however that ends: Ray has the kernel tell its daemons.
"""

import atexit
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from moe_replay.errors import ConfigError

_PREFIX = "moe-replay-ray-"
_LOCK = "lock"
_CONNECT_SECONDS = 10.0


class RayCluster:
    """A connection of this process; one at a time, as Ray has it."""

    def __init__(self, processes: int, key: str, colocated: bool):
        """For so many processes that compute, as the config's `key` asks for.

        Raises ConfigError when there is no cluster at RAY_ADDRESS, and as `device_for`.
        """
        import ray

        self._own: tuple[Path, TextIO] | None = None
        quiet: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": True}
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _require_answer(address)
            try:
                ray.init(address=address, **quiet)
            except ConnectionError as error:
                raise ConfigError(
                    f"the Ray cluster at RAY_ADDRESS = {address} does not take this process ({error}); one with a "
                    "secret wants it in RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token"
                ) from error
        else:
            # A secret of its own, or Ray would write one into the user's home.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            self._own = _session_folder()
            ray.init(
                address="local",
                num_cpus=processes,
                include_dashboard=False,
                _temp_dir=str(self._own[0] / "ray"),  # to which Ray gives everybody access, but not to what is above
                **quiet,
            )
        atexit.register(self.close)
        self.device = device_for(ray.cluster_resources(), processes, key, address, colocated)
        """What they compute on: `GPU` or `CPU`."""

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        atexit.unregister(self.close)
        ray.shutdown()
        if self._own:
            folder, lock = self._own
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _require_answer(address: str) -> None:
    """Tell at once what Ray would find out in a quarter of an hour."""
    host, _, port = address.rpartition(":")
    try:
        if host or port.isdecimal():  # else Ray's word for a cluster of this machine
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS = {address} ({error}); give HOST:PORT of one that this machine has "
            "joined (ray start), or unset RAY_ADDRESS to have one on this machine for the run"
        ) from error


def in_one_line(error: Exception) -> str:
    """What Ray tells of a process that died, for a message of ours."""
    return " ".join(str(error).split())[:500]


def device_for(
    there: Mapping[str, float], processes: int, key: str, address: str | None, colocated: bool
) -> Literal["GPU", "CPU"]:
    """What so many processes compute on, of the devices that are `there` in the cluster at an address, or in our own.

    Raises ConfigError when there are too few, and when processes of rollout and training are to be `colocated` on GPUs
    of a cluster that gives each of them its own.
    """
    device = "GPU" if there.get("GPU") and os.environ.get("VERL_PLATFORM") != "cpu" else "CPU"
    if (number := int(there.get(device, 0))) < processes:
        where = f"the Ray cluster at {address}" if address else "this machine"
        raise ConfigError(
            f"{key} = {processes} takes a {device} for each, and {where} has {number}; lower it, or give a larger "
            "cluster in RAY_ADDRESS"
        )
    if colocated and address and device == "GPU":
        raise ConfigError(
            "resources.colocated has rollout and training take turns on GPUs, and the Ray cluster at RAY_ADDRESS = "
            f"{address} gives each of them GPUs of its own; set it to false, or unset RAY_ADDRESS to train on this "
            "machine alone"
        )
    return device


def _session_folder() -> tuple[Path, TextIO]:
    """Where a cluster keeps sockets and logs, and the lock on it; folders of processes that were killed are removed.

    Not below MOE_REPLAY_HOME, which may be shared between machines, and whose path may be too long for a socket.
    """
    for abandoned in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), abandoned.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock
