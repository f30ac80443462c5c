"""Objects of a run that may go, and removing them; what is committed, or superseded and kept, never goes unasked."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.layout import COMMIT_FILE, TIMING_FILE, placement_file, stage_of
from moe_replay.archive.placement import Expiry
from moe_replay.archive.storage import Storage, StoredFile
from moe_replay.archive.superseding import superseded_artifact, superseded_folders

Files = dict[str, StoredFile]
"""A listing, by path."""


@dataclass(frozen=True)
class Removable:
    """Objects that can go together, for one reason."""

    name: str
    """Folder or object, relative to the root."""
    why: str
    paths: tuple[str, ...]
    """Relative to the root."""
    bytes: int
    loses: tuple[Artifact, Expiry] | None = None
    """The artifact that loses them, and what is to be written down of it before; none for leftovers."""


@dataclass(frozen=True)
class Findings:
    """What was found in one run, directly under a root, or in all."""

    removable: list[Removable]
    left_alone: list[str]
    """What was not judged, each with the reason."""

    @classmethod
    def joined(cls, findings: Sequence["Findings"]) -> "Findings":
        """All of several findings, in order."""
        return cls(
            [removable for found in findings for removable in found.removable],
            [line for found in findings for line in found.left_alone],
        )


def remove(root: str, removable: Removable) -> None:
    """Remove what was found and not committed since; when that is cut short, the next search finds the rest."""
    storage, paths = Storage.at(root), removable.paths
    if removable.loses:
        artifact, expiry = removable.loses
        placement = artifact.placement.model_copy(update={"expiry": expiry})
        placement.write(storage / artifact.commit.run_id / artifact.ref.uri, artifact.ref.sha256)
    else:
        # A writer that slept may have woken, or a stage been superseded.
        needed = _needed_in(root, removable.name)
        paths = tuple(path for path in paths if path not in needed)
    storage.remove_each(paths)
    if folder := storage.local_folder:
        _remove_empty_folders(folder, paths)


def files_of(artifact: Artifact) -> Iterator[str]:
    """Everything that belongs to a committed artifact, and what retention removed of it, relative to the run."""
    for name in (COMMIT_FILE, TIMING_FILE, placement_file(artifact.ref.sha256)):
        yield f"{artifact.ref.uri}/{name}"
    for stored in artifact.commit.objects:
        yield path_of(artifact, stored.path)


def path_of(artifact: Artifact, path: str) -> str:
    """Where an object lies, relative to the run."""
    iteration, _, stage = artifact.ref.uri.rpartition("/")
    return f"{iteration}/{artifact.placement.folder or stage}/{path}"


def _needed_in(root: str, name: str) -> set[str]:
    """Paths of what is committed of the stage that a leftover's folder is of, relative to the root.

    Also of what is superseded of it, unless that itself is what shall go.
    """
    run_id, *parts = name.split("/")
    if len(parts) != 3:
        return set()
    store, stage, iteration = RunStore(root, run_id), stage_of(parts[2]), int(parts[1])
    assert stage is not None
    committed = store.committed(stage, iteration)
    superseded = [superseded_artifact(store, folder) for folder in superseded_folders(store, iteration, stage)]
    kept = [one for one in superseded if one is not None and one.ref.uri != "/".join(parts)]
    return {f"{run_id}/{path}" for artifact in (committed, *kept) if artifact for path in files_of(artifact)}


def _remove_empty_folders(root: Path, paths: Iterable[str]) -> None:
    # The last parent is the root itself.
    folders = {parent for path in paths for parent in PurePosixPath(path).parents[:-1]}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        # One that is not empty stays.
        with suppress(OSError):
            (root / folder).rmdir()
