"""Reading a committed artifact: everything is checked against the commit before it is handed out."""

import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from moe_replay.archive.commits import ArtifactRef, Commit, StoredObject, sha256_hex
from moe_replay.archive.layout import COMMIT_FILE
from moe_replay.archive.placement import Expiry, Placement
from moe_replay.archive.storage import Storage
from moe_replay.errors import ArchiveCorrupt, ConfigError

if TYPE_CHECKING:
    from moe_replay.archive.zarr_stores import VerifyingStore

_PARALLEL_OBJECTS = 8


class Artifact:
    """One committed artifact, opened for reading."""

    def __init__(self, ref: ArtifactRef, commit: Commit, stage: Storage, placement: Placement) -> None:
        self.ref = ref
        self.commit = commit
        self.placement = placement
        self._stage = stage
        self._storage = placement.objects_of(stage)
        self._manifest = {stored.path: stored for stored in commit.objects}

    @classmethod
    def open(cls, storage: Storage, ref: ArtifactRef) -> "Artifact":
        """Open the artifact whose stage's folder is `storage`.

        Raises ArchiveCorrupt unless its commit is the one `ref` names.
        """
        try:
            data = storage.read(COMMIT_FILE)
        except FileNotFoundError as error:
            raise ArchiveCorrupt(
                f"object {storage.name}/{COMMIT_FILE} is missing: expected a commit with sha256 {ref.sha256}; "
                "restore it, or resume the run to make it again"
            ) from error
        if sha256_hex(data) != ref.sha256:
            raise ArchiveCorrupt(
                f"object {storage.name}/{COMMIT_FILE} is not the one referred to: expected sha256 {ref.sha256}, found "
                f"{sha256_hex(data)}; restore it, or delete what was made from it and resume the run"
            )
        return cls._of(storage, ref, data)

    @classmethod
    def found(cls, storage: Storage, uri: str) -> "Artifact":
        """Open whatever is committed in the stage's folder `storage`, known by `uri`; FileNotFoundError for nothing."""
        data = storage.read(COMMIT_FILE)
        return cls._of(storage, ArtifactRef(uri=uri, sha256=sha256_hex(data)), data)

    @classmethod
    def _of(cls, storage: Storage, ref: ArtifactRef, data: bytes) -> "Artifact":
        commit = Commit.from_bytes(data, f"{storage.name}/{COMMIT_FILE}")
        return cls(ref, commit, storage, Placement.read(storage, ref.sha256))

    @property
    def name(self) -> str:
        """Where the artifact is, for messages."""
        return self._stage.name

    @property
    def expiry(self) -> Expiry | None:
        """Which objects retention removed, None for none."""
        return self.placement.expiry

    @property
    def kept(self) -> list[StoredObject]:
        """The objects that retention did not remove."""
        return [stored for stored in self.commit.objects if not self.placement.lacks(stored.path)]

    def read_bytes(self, path: str) -> bytes:
        """One whole object.

        Raises ArchiveCorrupt unless it is exactly what was committed, ConfigError when retention removed it.
        """
        expected = self._manifest.get(path)
        if expected is None:
            raise ArchiveCorrupt(
                f"artifact {self.name} holds no object {path[:200]!r}; "
                f"it has {len(self._manifest)}: {', '.join(list(self._manifest)[:8])}"
            )
        self._require_kept([expected])
        try:
            data = self._storage.read(path)
        except FileNotFoundError:
            data = None
        return expected.checked(self._storage.name, data)

    def zarr_store(self, subpath: str) -> "VerifyingStore":
        """A read-only zarr store over the objects below `subpath` that checks every object it reads.

        Raises ConfigError when retention removed any of them.
        """
        from moe_replay.archive.zarr_stores import VerifyingStore

        self._require_kept([stored for stored in self.commit.objects if stored.path.startswith(f"{subpath}/")])
        store = self._storage.zarr_store(subpath).with_read_only(True)
        return VerifyingStore(store, subpath, self._manifest, self._storage.name)

    def problems(self) -> list[str]:
        """Re-read every object that retention left; what is missing, truncated or altered, one line each."""
        return self._problems_at(self._storage, self.kept)

    def require_present(self) -> None:
        """Raise ArchiveCorrupt unless every object is there in its size, but for those that retention removed.

        One listing: skipping a committed stage must not cost a read of its checkpoint. Contents are checked when they
        are read.
        """
        sizes = self._storage.sizes()
        problems = [
            stored.problem(
                self._storage.name, None if stored.path not in sizes else (sizes[stored.path], stored.sha256)
            )
            for stored in self.kept
        ]
        if found := [problem for problem in problems if problem]:
            raise ArchiveCorrupt("\n".join(found))

    def localize(self, cache_dir: Path, below: str = "") -> Path:
        """A folder on this machine's disk with all objects, or all `below` a subfolder, each checked just now.

        Paths in it are the objects' own. Local artifacts stay in place; others are downloaded whole or not at all
        into a folder of `cache_dir` named by the reference's sha256. Raises ArchiveCorrupt with everything that is
        wrong, ConfigError when retention removed what is wanted.
        """
        wanted = [stored for stored in self.commit.objects if not below or stored.path.startswith(f"{below}/")]
        if below and not wanted:
            raise ArchiveCorrupt(f"artifact {self.name} holds no object below {below!r}; it is of another stage")
        self._require_kept(wanted)
        local = self._storage.local_folder
        if local is not None:
            self._require(self._storage, wanted)
            return local
        # A part has a folder of its own, or it would pass for the whole.
        kept = cache_dir / "-".join([self.ref.sha256, *below.split("/")]).rstrip("-")
        if kept.exists():
            if not self._problems_at(Storage.at(str(kept)), wanted):
                return kept
            shutil.rmtree(kept)
        partial = cache_dir / f".{kept.name}.{uuid.uuid4().hex}"
        partial.mkdir(parents=True)
        try:
            self._download(wanted, partial)
            _move_into_place(partial, kept)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return kept

    def _download(self, wanted: Sequence[StoredObject], folder: Path) -> None:
        def fetch(stored: StoredObject) -> None:
            target = folder / stored.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._storage.download(stored.path, target)
            except FileNotFoundError:
                target.unlink(missing_ok=True)

        with ThreadPoolExecutor(_PARALLEL_OBJECTS) as pool:
            list(pool.map(fetch, wanted))
        self._require(Storage.at(str(folder)), wanted)

    def _require_kept(self, wanted: Sequence[StoredObject]) -> None:
        expiry = self.placement.expiry
        lacking = [stored.path for stored in wanted if self.placement.lacks(stored.path)]
        if expiry and lacking:
            raise ConfigError(
                f"{len(lacking)} objects of {self.name}, {lacking[0]} among them, were removed by retention on "
                f"{expiry.on:%Y-%m-%d} ({expiry.why}); the commit and its metrics stay, what was removed can only be "
                "made again by a new run"
            )

    def _require(self, storage: Storage, wanted: Sequence[StoredObject]) -> None:
        problems = self._problems_at(storage, wanted)
        if problems:
            raise ArchiveCorrupt("\n".join(problems))

    def _problems_at(self, storage: Storage, wanted: Sequence[StoredObject]) -> list[str]:
        with ThreadPoolExecutor(_PARALLEL_OBJECTS) as pool:
            found = pool.map(lambda stored: self._problem_in(storage, stored), wanted)
            return [problem for problem in found if problem]

    def _problem_in(self, storage: Storage, stored: StoredObject) -> str | None:
        try:
            found = storage.digest(stored.path)
        except FileNotFoundError:
            found = None
        return stored.problem(self._storage.name, found)


def _move_into_place(partial: Path, kept: Path) -> None:
    try:
        os.rename(partial, kept)
    except OSError:
        # Another process localized the same artifact first; its copy is as good.
        if not kept.is_dir():
            raise
