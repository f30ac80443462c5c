"""Objects under one folder of any fsspec file system, with errors that say whether to try again.

The only file that calls fsspec; what it raises besides FileNotFoundError and create's FileExistsError is a
ReplayError.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.mapping import FSMap
from fsspec.spec import AbstractFileSystem
from zarr.storage import FsspecStore

from moe_replay.errors import ConfigError, ReplayError, StorageUnavailable

_BLOCK = 8 * 2**20
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
# Object-store clients are optional dependencies and their network errors are no OSErrors: told by name.
_NETWORK_ERRORS = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError"}
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure", "adlfs"}


class Storage:
    """Read and write objects by path below one folder; opening one does no input or output."""

    def __init__(self, fs: AbstractFileSystem, base: str) -> None:
        self._fs = fs
        self._base = base.rstrip("/")

    @classmethod
    def at(cls, url: str) -> "Storage":
        """Storage at an fsspec URL or a local path; raises ConfigError when nothing can serve such a URL."""
        # Listings change under us when another process commits, so they are never cached.
        options: dict[str, bool] = {"use_listings_cache": False}
        if url.startswith(("file:", "local:")) or "://" not in url:
            options["auto_mkdir"] = True
        try:
            fs, base = url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"no file system serves {redacted(url)} ({type(error).__name__}); use a local path, file://, s3:// or "
                "another fsspec URL whose package is installed"
            ) from None
        return cls(fs, base)

    def __truediv__(self, folder: str) -> "Storage":
        return Storage(self._fs, f"{self._base}/{folder}")

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
            return cast(bytes, self._fs.cat_file(self._at(path)))

    def write(self, path: str, data: bytes) -> None:
        """Write or overwrite one object."""
        with storage_errors(f"writing {self.name}/{path}", creating=True):
            self._fs.pipe_file(self._at(path), data)

    def create(self, path: str, data: bytes) -> None:
        """Write one object whole or not at all; raises FileExistsError when there is one already.

        On stores without conditional put the check and the put are two requests.
        """
        with storage_errors(f"writing {self.name}/{path}", creating=True):
            local = self.local_folder is not None
            created = _create_local(Path(self._at(path)), data) if local else self._create_remote(path, data)
        if not created:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def upload(self, local: Path, path: str) -> None:
        """Copy a local file to an object."""
        with storage_errors(f"writing {self.name}/{path}", creating=True):
            self._fs.put_file(str(local), self._at(path))

    def download(self, path: str, local: Path) -> None:
        """Copy an object to a local file; raises FileNotFoundError when there is none."""
        with storage_errors(f"reading {self.name}/{path}"):
            self._fs.get_file(self._at(path), str(local))

    def digest(self, path: str) -> tuple[int, str]:
        """(size, sha256) of an object, read in blocks; raises FileNotFoundError when there is none."""
        with storage_errors(f"reading {self.name}/{path}"):
            sha256, size = hashlib.sha256(), 0
            with self._fs.open(self._at(path), "rb", block_size=_BLOCK) as stream:
                while block := cast(bytes, stream.read(_BLOCK)):
                    sha256.update(block)
                    size += len(block)
        return size, sha256.hexdigest()

    def sizes(self) -> dict[str, int]:
        """Sizes of all objects below the folder by path; empty when there is no such folder."""
        with storage_errors(f"listing {self.name}"):
            found = cast(dict[str, Any], self._fs.find(self._base, detail=True))
        return {path[len(self._base) + 1 :]: info["size"] for path, info in found.items()}

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, sorted."""
        try:
            with storage_errors(f"listing {self.name}"):
                entries = self._fs.ls(self._base, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

    def remove(self, path: str) -> None:
        """Remove one object; nothing happens when there is none."""
        try:
            with storage_errors(f"removing {self.name}/{path}"):
                self._fs.rm_file(self._at(path))
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
        for path in self.sizes():
            self.remove(path)

    def zarr_store(self, folder: str) -> FsspecStore:
        """A zarr store over one folder below this one, reading and writing without any check."""
        return FsspecStore.from_mapper(FSMap(self._at(folder), self._fs))

    def _create_remote(self, path: str, data: bytes) -> bool:
        try:
            self._fs.cat_file(self._at(path))
        except FileNotFoundError:
            try:
                self._fs.pipe_file(self._at(path), data, mode="create")
            except FileExistsError:
                return False
            return True
        return False

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}"


@contextmanager
def storage_errors(action: str, creating: bool = False) -> Iterator[None]:
    """Raise a store's errors as StorageUnavailable (try again) or ConfigError (denied), without their text.

    "Not found" passes through, except while `creating`: then the bucket is missing.
    A store's own message may quote keys or signed URLs, so only its type and error number are told.
    """
    try:
        yield
    except ReplayError:
        raise
    except FileNotFoundError:
        if not creating:
            raise
        raise ConfigError(f"{action} failed: the bucket or folder does not exist; create it first") from None
    except Exception as error:
        kind = _kind_of(error)
        if kind is None:
            raise
        number = error.errno if isinstance(error, OSError) else None
        reason = type(error).__name__ + (f", {os.strerror(number)}" if isinstance(number, int) else "")
        way_out = (
            "try again once the storage answers"
            if kind is StorageUnavailable
            else "check the root, the permissions on it and the credentials in the environment"
        )
        # Not even as a cause: Prefect and the engines' logs keep whole tracebacks.
        raise kind(f"{action} failed ({reason}); {way_out}") from None


def redacted(url: str) -> str:
    """`url` without a user name, password or query in it."""
    return re.sub(r"\?.*$", "", re.sub(r"//.*@", "//", url))


def _kind_of(error: Exception) -> type[ConfigError] | type[StorageUnavailable] | None:
    if isinstance(error, OSError):
        denied = isinstance(error, PermissionError) or error.errno in _DENIED
        return ConfigError if denied else StorageUnavailable
    if type(error).__module__.split(".")[0] in _CLIENTS:
        network = any(parent.__name__ in _NETWORK_ERRORS for parent in type(error).__mro__)
        return StorageUnavailable if network else ConfigError
    return None


def _create_local(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            # A link appears whole and fails when the name is taken; a rename would overwrite it.
            os.link(temporary, path)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
