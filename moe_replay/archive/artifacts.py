"""Artifacts of a run: written once by a stage, committed by one last object, verified when read.

A stage asks `find` for its commit, and only when there is none `begin`s to write; so a resumed run, a retried
task and a new machine all skip what is committed.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from moe_replay.archive.commits import ArtifactRef, Commit, StoredObject, canonical_json, sha256_hex
from moe_replay.archive.layout import (
    ABOUT_KEY,
    COMMIT_FILE,
    RUN_FILE,
    STAGES,
    TIMING_FILE,
    RunLayout,
    superseded_folder,
)
from moe_replay.archive.reading import Artifact
from moe_replay.archive.storage import Storage
from moe_replay.archive.writing import StageKey, StageWriter, timing_of
from moe_replay.errors import ArchiveCorrupt, ConfigError

__all__ = ["Artifact", "ArtifactRef", "Commit", "RunStore", "StageStatus", "StageWriter", "StoredObject"]


@dataclass(frozen=True)
class StageStatus:
    """What storage alone says about one stage of one iteration."""

    iteration: int
    stage: str
    state: str
    """`committed` or `missing`."""
    bytes: int
    """Size of the committed objects, 0 when missing."""
    seconds: float | None
    """From begin to commit, None when unknown."""
    finished: datetime | None
    """When it was committed, None when unknown."""
    expired_bytes: int = 0
    """Size of the committed objects that retention removed."""


class RunStore:
    """One run under a root, which is any fsspec URL or a local path. Opening it touches nothing."""

    def __init__(self, root: str, run_id: str) -> None:
        self.layout = RunLayout(run_id)
        self._root = Storage.at(root)
        self._run = self._root / run_id

    @property
    def run_id(self) -> str:
        """The run's name under the root."""
        return self.layout.run_id

    @property
    def name(self) -> str:
        """The run folder's URL, without credentials."""
        return self._run.name

    @property
    def folder(self) -> Storage:
        """The run's folder."""
        return self._run

    def probe_writable(self) -> None:
        """Write and remove a small object under the root; raises ConfigError when that is not allowed."""
        probe = f"_probe-{uuid4().hex}"
        self._root.write(probe, b"moe-replay\n")
        self._root.remove(probe)

    def exists(self) -> bool:
        """Whether the run was created."""
        try:
            self._run.read(RUN_FILE)
        except FileNotFoundError:
            return False
        return True

    def create_run(self, document: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        """Write `run.json`, or accept the one that is there if it says the same.

        `about` is kept under that key for people to read, and may differ when the run is opened again.
        Raises ConfigError naming the keys in which an existing run differs.
        """
        try:
            self._run.create(RUN_FILE, canonical_json({**document, ABOUT_KEY: about or {}}))
        except FileExistsError as error:
            if problem := self._difference(self.read_run(), document):
                raise ConfigError(problem) from error

    def reopen_run(self, document: dict[str, Any], changed: dict[str, Any]) -> None:
        """Put `changed` in the place of `run.json` if it says the same as `document`, but for what it tells about it.

        Readers see the old or the new one whole. Raises ConfigError as `create_run` does, and then writes nothing.
        """
        if problem := self._difference(changed, document):
            raise ConfigError(problem)
        if changed != self.read_run():
            self.rewrite_run(changed)

    def rewrite_run(self, document: dict[str, Any]) -> None:
        """Put another `run.json` in the place of the one that is there; readers see the old or the new one whole."""
        self._run.write(RUN_FILE, canonical_json(document))

    def read_run(self) -> dict[str, Any]:
        """The document in `run.json`; raises ConfigError when there is no such run."""
        try:
            data = self._run.read(RUN_FILE)
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no run {self.run_id} under {self._root.name}; check the run id and root"
            ) from error
        # Apart from the reading, whose own errors are ValueErrors too.
        try:
            document = json.loads(data)
        except ValueError as error:
            raise ArchiveCorrupt(f"object {self.name}/{RUN_FILE} is not JSON; restore it or start a new run") from error
        if not isinstance(document, dict):
            raise ArchiveCorrupt(f"object {self.name}/{RUN_FILE} is not a JSON object; restore it or start a new run")
        return document

    def begin(self, stage: str, iteration: int, inputs: Mapping[str, ArtifactRef], config_digest: str) -> StageWriter:
        """Start writing a stage, whatever others left or still write; raises ConfigError if it is committed."""
        uri = self.layout.stage(iteration, stage)
        if self.commit_of(stage, iteration) is not None:
            raise ConfigError(
                f"{self.name}/{uri} is committed and artifacts are written once; use the committed one, "
                "or a new run id to make another"
            )
        key = StageKey(self.run_id, iteration, stage, uri, dict(inputs), config_digest)
        return StageWriter(self._run / uri, key)

    def find(
        self,
        stage: str,
        iteration: int,
        inputs: Mapping[str, ArtifactRef],
        config_digest: str,
        earlier: Collection[str] = (),
    ) -> ArtifactRef | None:
        """The stage's commit if it is there and made from these inputs and this configuration; else None.

        One made under any of the `earlier` configurations of the run is as good. Raises ConfigError for a commit of
        other inputs or configuration, ArchiveCorrupt when an object is missing or truncated, other than by retention.
        Contents are checked when they are read.
        """
        artifact = self.committed(stage, iteration)
        if artifact is None:
            return None
        committed = artifact.commit
        if committed.config_digest not in {config_digest, *earlier}:
            raise ConfigError(
                f"{artifact.name} was committed under config digest {committed.config_digest}, this run has "
                f"{config_digest}; run with the configuration of the commit, or under a new run id"
            )
        names = inputs.keys() | committed.inputs.keys()
        differing = sorted(name for name in names if inputs.get(name) != committed.inputs.get(name))
        if differing:
            raise ConfigError(
                f"{artifact.name} was committed from other inputs: {', '.join(differing)} differ; "
                "an earlier stage was made again: delete this stage's folder, or use a new run id"
            )
        artifact.require_present()
        return artifact.ref

    def committed(self, stage: str, iteration: int) -> Artifact | None:
        """The stage's artifact whatever it was made from, or None when it has no commit."""
        uri = self.layout.stage(iteration, stage)
        try:
            artifact = Artifact.found(self._run / uri, uri)
        except FileNotFoundError:
            return None
        self._require_in_place(artifact.ref, artifact.commit)
        return artifact

    def commit_of(self, stage: str, iteration: int) -> ArtifactRef | None:
        """The stage's commit whatever it was made from, or None; only the commit object is read."""
        uri = self.layout.stage(iteration, stage)
        try:
            data = (self._run / uri).read(COMMIT_FILE)
        except FileNotFoundError:
            return None
        ref = ArtifactRef(uri=uri, sha256=sha256_hex(data))
        self._require_in_place(ref, Commit.from_bytes(data, f"{self.name}/{uri}/{COMMIT_FILE}"))
        return ref

    def open(self, ref: ArtifactRef) -> Artifact:
        """Open an artifact of this run, or of elsewhere when its uri is a URL.

        Raises ArchiveCorrupt unless its commit object is the very one `ref` names and belongs where it lies. What was
        superseded elsewhere is found where it is kept since.
        """
        if ref.is_url:
            return _open_elsewhere(ref)
        artifact = Artifact.open(self._run / ref.uri, ref)
        self._require_in_place(ref, artifact.commit)
        return artifact

    def verify(self, ref: ArtifactRef) -> list[str]:
        """Everything that is wrong with an artifact's objects, one line each; re-reads all that retention left."""
        try:
            return self.open(ref).problems()
        except ArchiveCorrupt as error:
            return [str(error)]

    def lost_inputs(self, artifact: Artifact) -> list[str]:
        """What an artifact was made from and is no longer there as it was, one line each."""
        problems = []
        for name, ref in sorted(artifact.commit.inputs.items()):
            if not ref.is_stored:
                continue
            try:
                self.open(ref)
            except ArchiveCorrupt as error:
                problems.append(f"{artifact.name} was made from its {name}, but {error}")
        return problems

    def iterations(self) -> list[int]:
        """Iterations that storage knows of, ascending, committed or not."""
        found = (RunLayout.iteration_of(folder) for folder in (self._run / "iterations").folders())
        return sorted(iteration for iteration in found if iteration is not None)

    def status(self, iteration: int) -> list[StageStatus]:
        """The state of each stage of one iteration, in order, from storage alone."""
        return [self._status_of(stage, iteration) for stage in STAGES]

    def _status_of(self, stage: str, iteration: int) -> StageStatus:
        artifact = self.committed(stage, iteration)
        if artifact is None:
            return StageStatus(iteration, stage, "missing", 0, None, None)
        try:
            seconds, finished = timing_of((self._run / artifact.ref.uri).read(TIMING_FILE))
        except FileNotFoundError:
            seconds, finished = None, None
        num_bytes = artifact.commit.num_bytes
        expired_bytes = num_bytes - sum(stored.size for stored in artifact.kept)
        return StageStatus(iteration, stage, "committed", num_bytes, seconds, finished, expired_bytes)

    def _difference(self, stored: dict[str, Any], wanted: dict[str, Any]) -> str | None:
        """What is wrong when a run that is stored shall be opened as `wanted`."""
        told = {key: value for key, value in stored.items() if key != ABOUT_KEY}
        differing = _differing_keys(told, json.loads(canonical_json(wanted)))
        if not differing:
            return None
        return (
            f"run {self.run_id} exists with another configuration: {', '.join(differing[:12])} differ "
            f"({len(differing)} keys); choose another run id, or resume it with the configuration it has"
        )

    def _require_in_place(self, ref: ArtifactRef, commit: Commit) -> None:
        place = RunLayout.place_of(ref.uri)
        if (commit.run_id, (commit.iteration, commit.stage)) != (self.run_id, place):
            raise ArchiveCorrupt(
                f"object {self.name}/{ref.uri}/{COMMIT_FILE} belongs elsewhere: it was committed as run "
                f"{commit.run_id}, iteration {commit.iteration}, stage {commit.stage}; "
                "restore the run's own, or delete the folder"
            )


def _open_elsewhere(ref: ArtifactRef) -> Artifact:
    place = Storage.at(ref.uri)
    try:
        return Artifact.open(place, ref)
    except ArchiveCorrupt:
        aside = place.beside(superseded_folder(ref.uri.rstrip("/").rpartition("/")[2], ref.sha256))
        with suppress(ArchiveCorrupt):
            return Artifact.open(aside, ref)
        raise


def _differing_keys(stored: Any, wanted: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ; only keys are told, values may be private."""
    if not isinstance(stored, dict) or not isinstance(wanted, dict):
        return [] if stored == wanted and type(stored) is type(wanted) else [prefix or "the document"]
    missing = object()
    return [
        key
        for name in sorted(stored.keys() | wanted.keys())
        for key in _differing_keys(
            stored.get(name, missing), wanted.get(name, missing), f"{prefix}.{name}" if prefix else name
        )
    ]
