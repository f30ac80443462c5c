"""Scratch folders on local disk that are gone after use, also when their user was killed."""

import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_replay.archive.storage_errors import told_of_full_disk


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder below `parent`, removed afterwards; those of killed processes are removed before.

    Raises StorageFull when no room is left there.
    """
    with told_of_full_disk(str(parent)):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        folder = parent / uuid.uuid4().hex
        # Beside the folder, which holds nothing but its user's files. The system lets go of it however the user ends.
        lock = folder.with_suffix(".lock")
        try:
            with lock.open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                folder.mkdir()
                yield folder
        finally:
            _remove(folder)


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob("*.lock"):
        with suppress(OSError), lock.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.with_suffix(""))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)
