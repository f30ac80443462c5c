"""What a stage commits: references in, objects and metrics out, in bytes that depend on nothing else.

The commit object holds no wall-clock time, host or absolute path, so that the same seed gives the same bytes.
"""

import hashlib
import json
import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe_replay.archive.layout import check_object_path, check_run_id
from moe_replay.errors import ArchiveCorrupt

FORMAT_VERSION = 1

JsonScalar = bool | int | float | str | None
_SHA256 = r"^[0-9a-f]{64}$"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\x00-\x1f]+")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(_Record):
    """Names one committed artifact for good: where it is, and the checksum of its commit object."""

    uri: str
    """Folder relative to the run's, e.g. `iterations/00003/rollout`, or a URL for an artifact outside the run."""
    sha256: str = Field(pattern=_SHA256)
    """SHA-256 of the bytes of the artifact's `_committed.json`."""

    @field_validator("uri")
    @classmethod
    def _inside_run_or_url(cls, uri: str) -> str:
        return uri if _URL.fullmatch(uri) else check_object_path(uri)

    @property
    def is_stored(self) -> bool:
        """Whether it names an artifact in storage, and not the model that a run starts from."""
        return not self.uri.startswith("model://")

    @property
    def is_url(self) -> bool:
        """Whether the artifact lies outside the run."""
        return "://" in self.uri


class StoredObject(_Record):
    """One object of an artifact: path in its folder, size in bytes, checksum."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)

    @field_validator("path")
    @classmethod
    def _inside_folder(cls, path: str) -> str:
        return check_object_path(path)

    def problem(self, folder: str, found: tuple[int, str] | None) -> str | None:
        """What is wrong when (size, sha256) was found in `folder`, None for nothing; None if it is as committed."""
        way_out = "restore it, or delete the stage's folder and resume the run to make it again"
        name = f"object {folder}/{self.path}"
        if found is None:
            return f"{name} is missing: expected {self.size} bytes with sha256 {self.sha256}; {way_out}"
        size, sha256 = found
        if size != self.size:
            return f"{name} has the wrong size: expected {self.size} bytes, found {size}; {way_out}"
        if sha256 != self.sha256:
            return f"{name} was altered: expected sha256 {self.sha256}, found {sha256}; {way_out}"
        return None

    def checked(self, folder: str, data: bytes | None) -> bytes:
        """Return `data`; raises ArchiveCorrupt naming the object, expected and found, unless it is as committed."""
        problem = self.problem(folder, None if data is None else (len(data), sha256_hex(data)))
        if data is None or problem:
            raise ArchiveCorrupt(problem)
        return data


class Commit(_Record):
    """The last object a stage writes; without it nothing else the stage wrote exists."""

    format_version: int
    run_id: str
    iteration: int = Field(ge=0)
    stage: str
    config_digest: str
    inputs: dict[str, ArtifactRef]
    objects: tuple[StoredObject, ...]
    """Sorted by path, each path once."""
    metrics: dict[str, float]
    attributes: dict[str, JsonScalar | list[JsonScalar]]

    @field_validator("run_id")
    @classmethod
    def _plain_run_id(cls, run_id: str) -> str:
        return check_run_id(run_id)

    @field_validator("objects")
    @classmethod
    def _each_path_once(cls, objects: tuple[StoredObject, ...]) -> tuple[StoredObject, ...]:
        paths = [stored.path for stored in objects]
        if paths != sorted(set(paths)):
            raise ValueError("objects must be sorted by path and name each path once")
        return objects

    @field_validator("metrics")
    @classmethod
    def _reproducible(cls, metrics: dict[str, float]) -> dict[str, float]:
        for name, number in metrics.items():
            if name.startswith("time/"):
                raise ValueError(f"metric {name} is a wall-clock time; commits hold only what a seed reproduces")
            if not math.isfinite(number):
                raise ValueError(f"metric {name} is {number}; a stage that diverged must not be committed")
        return metrics

    @property
    def num_bytes(self) -> int:
        """Size of all objects together."""
        return sum(stored.size for stored in self.objects)

    def to_bytes(self) -> bytes:
        """The canonical bytes of the commit object: the commit and a checksum of it, keys sorted."""
        body = self.model_dump(mode="json")
        # The checksum lets `verify` find an altered commit even where no reference to it is at hand.
        return canonical_json({"commit": body, "sha256": sha256_hex(canonical_json(body))})

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Commit":
        """Parse the commit object called `name`; raises ArchiveCorrupt unless it is whole and canonical."""
        try:
            document = json.loads(data)
            body, sha256 = document["commit"], document["sha256"]
            version = body["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArchiveCorrupt(
                f"commit object {name} is not a commit ({len(data)} bytes, {type(error).__name__}); "
                "delete the stage's folder and resume the run to make it again"
            ) from error
        if version != FORMAT_VERSION:
            raise ArchiveCorrupt(
                f"commit object {name} has format version {version!r}, this code reads {FORMAT_VERSION}; "
                "read it with the moe-replay that wrote it"
            )
        try:
            commit = cls.model_validate_json(json.dumps(body))
        except ValidationError as error:
            raise ArchiveCorrupt(f"commit object {name} breaks the format: {_first_problem(error)}") from error
        expected = sha256_hex(canonical_json(commit.model_dump(mode="json")))
        if sha256 != expected or data != commit.to_bytes():
            raise ArchiveCorrupt(
                f"commit object {name} was altered: its content has sha256 {expected}, it says {str(sha256)[:64]}; "
                "restore it, or delete the stage's folder and resume the run to make it again"
            )
        return commit


def canonical_json(document: Any) -> bytes:
    """JSON bytes that depend on the content alone: sorted keys, no spaces, UTF-8, no NaN; ends with a newline."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
