"""Objects under one folder of any fsspec file system, with errors that say whether to try again.

The only file that calls fsspec; what it raises besides FileNotFoundError and create's FileExistsError is a
ReplayError. Remote stores are asked patiently: see `storage_retries`.
"""

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.mapping import FSMap
from fsspec.spec import AbstractFileSystem

from moe_replay.archive.storage_errors import redacted, s3_code, storage_errors
from moe_replay.archive.storage_retries import patiently
from moe_replay.errors import ConfigError

if TYPE_CHECKING:
    from zarr.storage import FsspecStore

__all__ = ["Storage", "file_aside", "redacted", "storage_errors"]

_BLOCK = 8 * 2**20
_PARALLEL_REMOVALS = 8
_MEETINGS = 10
"""How often a folder may vanish between its making and the first file in it."""
_READ_TIMEOUT = 30
"""Seconds without a byte from S3 after which a request is repeated."""
_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Where file systems keep the time of an object's last change."""


class StoredFile(NamedTuple):
    """What a listing says of one object."""

    size: int
    modified: datetime | None
    """None when the file system does not tell."""


class Storage:
    """Read and write objects by path below one folder; opening one does no input or output."""

    def __init__(self, fs: AbstractFileSystem, base: str) -> None:
        self._fs = fs
        self._base = base.rstrip("/")
        self._is_s3 = "s3" in fs.protocol
        # Otherwise s3fs asks for the size first, to read large objects in parts: twice the requests for all others.
        self._in_one_request = {"max_concurrency": 1} if self._is_s3 else {}
        if self._is_s3:
            _leave_retries_to_botocore(fs)

    @classmethod
    def at(cls, url: str) -> "Storage":
        """Storage at an fsspec URL or a local path; raises ConfigError when nothing can serve such a URL."""
        try:
            fs, base = url_to_fs(url, **_options(url))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"no file system serves {redacted(url)} ({type(error).__name__}); use a local path, file://, s3:// or "
                "another fsspec URL whose package is installed"
            ) from None
        return cls(fs, base)

    def __truediv__(self, folder: str) -> "Storage":
        return Storage(self._fs, f"{self._base}/{folder}")

    def beside(self, folder: str) -> "Storage":
        """The folder of that name next to this one."""
        return Storage(self._fs, f"{self._base.rpartition('/')[0]}/{folder}")

    @property
    def name(self) -> str:
        """The folder's URL as it may appear in messages: without credentials."""
        return redacted(self._fs.unstrip_protocol(self._base))

    @property
    def local_folder(self) -> Path | None:
        """The folder on this machine's disk, or None for remote storage."""
        return Path(self._base) if isinstance(self._fs, LocalFileSystem) else None

    def read(self, path: str) -> bytes:
        """The whole object; raises FileNotFoundError when there is none."""
        with storage_errors(f"reading {self.name}/{path}"):
            return cast(bytes, patiently(self._fs.cat_file, self._at(path), **self._in_one_request))

    def write(self, path: str, data: bytes) -> None:
        """Write or overwrite one object; readers see the old or the new one whole."""
        with storage_errors(f"writing {self.name}/{path} ({len(data):,} bytes)", creating=True):
            if self.local_folder is not None:
                with _written_aside(Path(self._at(path)), data) as temporary:
                    os.replace(temporary, self._at(path))
                return
            patiently(self._fs.pipe_file, self._at(path), data)

    def create(self, path: str, data: bytes) -> None:
        """Write one object whole or not at all; raises FileExistsError when there is one already.

        On stores without conditional put the check and the put are two requests. A put whose answer was lost is
        tried again and may then meet its own object: compare what is there.
        """
        with storage_errors(f"writing {self.name}/{path} ({len(data):,} bytes)", creating=True):
            local = self.local_folder is not None
            created = _create_local(Path(self._at(path)), data) if local else self._create_remote(path, data)
        if not created:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def take(self, local: Path, path: str) -> None:
        """Make a local file an object; the file is gone afterwards where it could be moved, else it is copied."""
        with storage_errors(f"writing {self.name}/{path} ({local.stat().st_size:,} bytes)", creating=True):
            if self.local_folder is None:
                patiently(self._fs.put_file, str(local), self._at(path))
                return
            target = Path(self._at(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Whoever reads a run's other objects reads this one too: libraries write files for their user alone.
            with file_aside(target) as plain:
                plain.touch()
                local.chmod(stat.S_IMODE(plain.stat().st_mode))
            # Between two file systems a copy.
            shutil.move(local, target)

    def download(self, path: str, local: Path) -> None:
        """Copy an object to a local file; raises FileNotFoundError when there is none."""
        with storage_errors(f"reading {self.name}/{path}"):
            patiently(self._fs.get_file, self._at(path), str(local))

    def digest(self, path: str) -> tuple[int, str]:
        """(size, sha256) of an object, read in blocks; raises FileNotFoundError when there is none."""
        with storage_errors(f"reading {self.name}/{path}"):
            sha256, size = hashlib.sha256(), 0
            for block in self._blocks(path):
                sha256.update(block)
                size += len(block)
        return size, sha256.hexdigest()

    def sizes(self) -> dict[str, int]:
        """Sizes of all objects below the folder by path; empty when there is no such folder."""
        return {path: found.size for path, found in self.files().items()}

    def files(self, deep: bool = True) -> dict[str, StoredFile]:
        """All objects below the folder by path, or only those directly in it; empty when there is no such folder."""
        if deep:
            with storage_errors(f"listing {self.name}"):
                found = cast(dict[str, Any], patiently(self._fs.find, self._base, detail=True)).values()
        else:
            # Not by `find` to a depth: that passes over errors, and an outage would look like an empty folder.
            found = [entry for entry in self._entries() if entry["type"] == "file"]
        return {info["name"][len(self._base) + 1 :]: StoredFile(info["size"], _modified(info)) for info in found}

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, sorted."""
        folders = (entry["name"].rstrip("/") for entry in self._entries() if entry["type"] == "directory")
        return sorted(folder.rsplit("/", 1)[-1] for folder in folders)

    def remove(self, path: str) -> None:
        """Remove one object; nothing happens when there is none."""
        try:
            with storage_errors(f"removing {self.name}/{path}"):
                patiently(self._fs.rm_file, self._at(path))
        except FileNotFoundError:
            pass

    def remove_all(self) -> None:
        """Remove the folder and every object below it; nothing happens when there is none."""
        folder = self.local_folder
        if folder is not None:
            with storage_errors(f"removing {self.name}"):
                if folder.exists():
                    shutil.rmtree(folder)
            return
        self.remove_each(self.sizes())

    def remove_each(self, paths: Iterable[str]) -> None:
        """Remove some objects; those that are not there are passed over."""
        # One request an object: S3's request for many names what failed in an answer that s3fs does not look at.
        with ThreadPoolExecutor(_PARALLEL_REMOVALS) as pool:
            list(pool.map(self.remove, paths))

    def zarr_store(self, folder: str) -> "FsspecStore":
        """A zarr store over one folder below this one, reading and writing without any check."""
        from moe_replay.archive.zarr_stores import PatientStore

        fs = self._fs
        if self._is_s3:
            options = {**fs.storage_options, **self._in_one_request, "asynchronous": True}
            fs = type(fs)(*fs.storage_args, **options)
            _leave_retries_to_botocore(fs)
        return PatientStore.from_mapper(FSMap(self._at(folder), fs))

    def _entries(self) -> list[dict[str, Any]]:
        try:
            with storage_errors(f"listing {self.name}"):
                return cast(list[dict[str, Any]], patiently(self._fs.ls, self._base, detail=True))
        except FileNotFoundError:
            return []

    def _create_remote(self, path: str, data: bytes) -> bool:
        try:
            patiently(self._fs.cat_file, self._at(path), **self._in_one_request)
        except FileNotFoundError:
            return self._put_if_absent(path, data)
        return False

    def _put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            patiently(self._fs.pipe_file, self._at(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if s3_code(error) in ("PreconditionFailed", "412"):
                return False
            if s3_code(error) not in ("NotImplemented", "501"):
                raise
            # The store refuses to put conditionally; that it had no such object a moment ago is all there is.
            patiently(self._fs.pipe_file, self._at(path), data)
        return True

    def _blocks(self, path: str) -> Iterator[bytes]:
        start, block = 0, b"unknown"
        while block and (start == 0 or len(block) == _BLOCK):
            block = self._range(path, start, start + _BLOCK)
            start += len(block)
            yield block

    def _range(self, path: str, start: int, stop: int) -> bytes:
        try:
            return cast(bytes, patiently(self._fs.cat_file, self._at(path), start=start, end=stop))
        except OSError as error:
            # Nothing begins there: the object ends, or is empty.
            if s3_code(error) in ("InvalidRange", "416"):
                return b""
            raise

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}"


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """A free name next to `path`, to make a file at and then move, so that `path` is never seen half written."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def _options(url: str) -> dict[str, Any]:
    # Listings change under us when another process commits, so they are never cached.
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("file:", "local:")) or "://" not in url:
        options["auto_mkdir"] = True
    if url.startswith(("s3:", "s3a:")):
        options["config_kwargs"] = {
            "retries": {"mode": "standard"},
            "read_timeout": _READ_TIMEOUT,
            # Commits hold checksums of all; some stores answer a range with the checksum of the whole.
            "response_checksum_validation": "when_required",
        }
        # The other SDKs read this variable, botocore does not.
        if region := os.environ.get("AWS_REGION"):
            options["client_kwargs"] = {"region_name": region}
    return options


def _leave_retries_to_botocore(fs: Any) -> None:
    # s3fs would repeat what botocore has repeated, and twice over when it reads.
    fs.retries = 1


def _create_local(path: Path, data: bytes) -> bool:
    with _written_aside(path, data) as temporary:
        try:
            # A link appears whole and fails when the name is taken; a rename would overwrite it.
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


@contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    """A file with `data` next to `path`, to be linked or moved there."""
    with file_aside(path) as temporary:
        with _opened_new(temporary) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary


def _opened_new(path: Path) -> BinaryIO:
    """A new file, in a folder that is made; whoever removes folders for being empty may remove it in between."""
    for attempt in range(_MEETINGS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        except (FileNotFoundError, FileExistsError):
            if attempt == _MEETINGS - 1:
                raise
    raise AssertionError("unreachable")


def _modified(info: dict[str, Any]) -> datetime | None:
    found = next((info[key] for key in _MODIFIED if info.get(key) is not None), None)
    if isinstance(found, int | float):
        return datetime.fromtimestamp(found, UTC)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if not isinstance(found, datetime):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
