"""Writing an artifact: objects first, into a folder that no other writer knows, then one commit.

Writers share nothing until they commit, so neither one that was given up and still writes nor two at once can harm
what another committed. On a local disk the whole folder is renamed into place. Elsewhere an object beside the commit
says where its objects lie (`placement`) and the commit is put if absent: of two writers the second is refused. A store
without conditional put lets both put when neither saw the other's commit; then the later commit stands, whole, and
what was made from the earlier is refused when it is read. What never got committed is removed by `retention`.
"""

import errno
import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from moe_replay.archive.commits import (
    FORMAT_VERSION,
    ArtifactRef,
    Commit,
    JsonScalar,
    StoredObject,
    canonical_json,
    sha256_hex,
)
from moe_replay.archive.layout import ATTEMPT_FILE, COMMIT_FILE, TIMING_FILE, attempt_folder, check_object_path
from moe_replay.archive.placement import Placement
from moe_replay.archive.storage import Storage, storage_errors
from moe_replay.errors import ConfigError

if TYPE_CHECKING:
    from moe_replay.archive.zarr_stores import HashingStore


@dataclass(frozen=True)
class StageKey:
    """What a stage's output is a function of, and where it goes."""

    run_id: str
    iteration: int
    stage: str
    uri: str
    inputs: Mapping[str, ArtifactRef]
    config_digest: str


class StageWriter:
    """Writes one attempt at one stage; nothing of it is visible before `commit` returns.

    Of several writers of one stage the first to commit wins; the others are refused when they try.
    """

    def __init__(self, stage: Storage, key: StageKey) -> None:
        """Start an attempt beside `stage`, the stage's folder, which has no commit; raises as `write_bytes` does.

        Raises ConfigError when that folder could not be moved into place later.
        """
        self.key = key
        self._stage = stage
        self._attempt = attempt_folder(key.stage, uuid.uuid4().hex)
        self._storage = stage.beside(self._attempt)
        self._written: dict[str, StoredObject] = {}
        self._committing = False
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        if stage.local_folder is not None and (found := stage.sizes()):
            raise ConfigError(
                f"{stage.name} holds {len(found)} objects, {min(found)} among them, and a stage is moved there whole; "
                "wait if another runner just committed it, else delete the folder, then resume the run"
            )
        # Shows who is at work, and finds out early whether anything can be written.
        self._storage.write(ATTEMPT_FILE, canonical_json({"began": self._started.isoformat(timespec="seconds")}))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write one object."""
        self._storage.write(check_object_path(path), data)
        self._written[path] = StoredObject(path=path, size=len(data), sha256=sha256_hex(data))

    def take_file(self, path: str, local: Path) -> None:
        """Make a local file an object; nobody must need the file any more, which is moved where that is possible."""
        check_object_path(path)
        size, sha256 = Storage.at(str(local.parent)).digest(local.name)
        self._storage.take(local, path)
        self._written[path] = StoredObject(path=path, size=size, sha256=sha256)

    def zarr_store(self, subpath: str) -> "HashingStore":
        """A zarr store below `subpath` that notes every object in the manifest as it is written."""
        from moe_replay.archive.zarr_stores import HashingStore

        return HashingStore(self._storage.zarr_store(check_object_path(subpath)), subpath, self._written)

    def commit(
        self,
        metrics: Mapping[str, float] | None = None,
        attributes: Mapping[str, JsonScalar | list[JsonScalar]] | None = None,
    ) -> ArtifactRef:
        """Make everything written visible at once.

        Raises ConfigError when another writer committed the stage or objects of this one were removed, and ValueError
        (pydantic's) for metrics that are not finite or are wall-clock times.
        """
        commit = Commit(
            format_version=FORMAT_VERSION,
            run_id=self.key.run_id,
            iteration=self.key.iteration,
            stage=self.key.stage,
            config_digest=self.key.config_digest,
            inputs=dict(self.key.inputs),
            objects=tuple(self._written[path] for path in sorted(self._written)),
            metrics=dict(metrics or {}),
            attributes=dict(attributes or {}),
        )
        self._committing = True
        data = commit.to_bytes()
        ref = ArtifactRef(uri=self.key.uri, sha256=sha256_hex(data))
        self._require_written()
        self._storage.remove(ATTEMPT_FILE)
        folder, place = self._storage.local_folder, self._stage.local_folder
        if folder is None or place is None:
            Placement(folder=self._attempt).write(self._stage, ref.sha256)
            self._write_timing(self._stage)
            committed = _created(self._stage, data)
        else:
            self._write_timing(self._storage)
            self._storage.write(COMMIT_FILE, data)
            committed = _moved(folder, place)
        # A put whose answer was lost is tried again by the store's client and then meets itself.
        if not committed and self._stage.read(COMMIT_FILE) != data:
            raise self._refused()
        return ref

    def discard(self) -> None:
        """Remove all that this attempt wrote, where nothing will come of it; it can't be written to or committed again.

        Raises RuntimeError once `commit` was called: a commit whose answer was lost may stand.
        """
        if self._committing:
            raise RuntimeError(f"{self._storage.name} may be committed; only an attempt that was not can be discarded")
        self._storage.remove_all()
        if (folder := self._storage.local_folder) is not None:
            # Of run/iterations/00003/_attempt-...; object storage has no folders to leave behind.
            for parent in tuple(folder.parents)[:3]:
                # One that is not empty stays.
                with suppress(OSError):
                    parent.rmdir()

    def _require_written(self) -> None:
        """Refuse early when the stage is committed, and when a cleaner took this attempt for a dead one."""
        if COMMIT_FILE in self._stage.sizes():
            raise self._refused()
        sizes = self._storage.sizes()
        missing = [path for path, stored in self._written.items() if sizes.get(path) != stored.size]
        if missing:
            raise ConfigError(
                f"{len(missing)} of {len(self._written)} objects that were written to {self._storage.name} are gone or "
                f"of another size, {missing[0]} among them; nothing was committed: let nothing else write or clean "
                "there, then resume the run"
            )

    def _write_timing(self, storage: Storage) -> None:
        times = {
            "started": self._started.isoformat(timespec="milliseconds"),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
        }
        storage.write(TIMING_FILE, canonical_json(times))

    def _refused(self) -> ConfigError:
        return ConfigError(
            f"{self._stage.name} was committed by another writer while this one wrote {len(self._written)} objects; "
            f"run {self.key.run_id} must have one runner at a time: stop the other, then resume the run"
        )


def _created(stage: Storage, data: bytes) -> bool:
    """Put the commit; false when the stage has one already."""
    try:
        stage.create(COMMIT_FILE, data)
    except FileExistsError:
        return False
    return True


def _moved(attempt: Path, stage: Path) -> bool:
    """Make a local attempt's folder the stage's; false when something lies there already."""
    with storage_errors(f"writing {stage}", creating=True):
        try:
            # Of folders only an empty one is replaced.
            os.rename(attempt, stage)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True


def timing_of(timing: bytes) -> tuple[float | None, datetime | None]:
    """Seconds a stage took and when it ended, from its `_timing.json`; None where that is unreadable."""
    try:
        document = json.loads(timing)
        return float(document["seconds"]), datetime.fromisoformat(document["finished"])
    except (ValueError, KeyError, TypeError):
        return None, None
