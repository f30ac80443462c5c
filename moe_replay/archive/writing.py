"""Writing an artifact: objects first, under keys that depend on nothing but the stage, then one commit."""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moe_replay.archive.commits import (
    FORMAT_VERSION,
    ArtifactRef,
    Commit,
    JsonScalar,
    StoredObject,
    canonical_json,
    sha256_hex,
)
from moe_replay.archive.layout import ATTEMPT_FILE, COMMIT_FILE, TIMING_FILE, check_object_path
from moe_replay.archive.storage import Storage
from moe_replay.archive.zarr_stores import HashingStore
from moe_replay.errors import ConfigError


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

    Of several writers of one stage the last to begin may commit; the others are refused when they try.
    """

    def __init__(self, storage: Storage, key: StageKey) -> None:
        """Clear what an uncommitted earlier attempt left in `storage`, the stage's folder, and take it over."""
        self.key = key
        self._storage = storage
        self._written: dict[str, StoredObject] = {}
        self._attempt = canonical_json({"attempt": uuid.uuid4().hex})
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        # Looked at right before it is cleared: what is committed meanwhile is never removed.
        if COMMIT_FILE in storage.sizes():
            raise self._refused()
        storage.remove_all()
        storage.write(ATTEMPT_FILE, self._attempt)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write one object."""
        self._storage.write(check_object_path(path), data)
        self._written[path] = StoredObject(path=path, size=len(data), sha256=sha256_hex(data))

    def put_file(self, path: str, local: Path) -> None:
        """Copy a local file to one object."""
        check_object_path(path)
        size, sha256 = Storage.at(str(local.parent)).digest(local.name)
        self._storage.upload(local, path)
        self._written[path] = StoredObject(path=path, size=size, sha256=sha256)

    def zarr_store(self, subpath: str) -> HashingStore:
        """A zarr store below `subpath` that notes every object in the manifest as it is written."""
        return HashingStore(self._storage.zarr_store(check_object_path(subpath)), subpath, self._written)

    def commit(
        self,
        metrics: Mapping[str, float] | None = None,
        attributes: Mapping[str, JsonScalar | list[JsonScalar]] | None = None,
    ) -> ArtifactRef:
        """Make everything written visible at once.

        Raises ConfigError when another writer took the stage over or committed it, and ValueError (pydantic's)
        for metrics that are not finite or are wall-clock times.
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
        self._require_own_attempt()
        self._write_timing()
        self._put_commit(commit.to_bytes())
        self._storage.remove(ATTEMPT_FILE)
        return ArtifactRef(uri=self.key.uri, sha256=sha256_hex(commit.to_bytes()))

    def _require_own_attempt(self) -> None:
        try:
            attempt = self._storage.read(ATTEMPT_FILE)
        except FileNotFoundError:
            attempt = b""
        sizes = self._storage.sizes()
        ours = attempt == self._attempt and all(
            sizes.get(path) == stored.size for path, stored in self._written.items()
        )
        if COMMIT_FILE in sizes or not ours:
            raise self._refused()

    def _put_commit(self, data: bytes) -> None:
        try:
            self._storage.create(COMMIT_FILE, data)
        except FileExistsError as error:
            # A put whose answer was lost is tried again by the store's client and then meets itself.
            if self._storage.read(COMMIT_FILE) != data:
                raise self._refused() from error

    def _write_timing(self) -> None:
        times = {
            "started": self._started.isoformat(timespec="milliseconds"),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
        }
        self._storage.write(TIMING_FILE, canonical_json(times))

    def _refused(self) -> ConfigError:
        return ConfigError(
            f"{self._storage.name} was taken over by another writer while this one wrote {len(self._written)} objects; "
            f"run {self.key.run_id} must have one runner at a time: stop the other, then resume the run"
        )


def timing_of(timing: bytes) -> tuple[float | None, datetime | None]:
    """Seconds a stage took and when it ended, from its `_timing.json`; None where that is unreadable."""
    try:
        document = json.loads(timing)
        return float(document["seconds"]), datetime.fromisoformat(document["finished"])
    except (ValueError, KeyError, TypeError):
        return None, None
