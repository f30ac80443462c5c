"""zarr stores: one is patient with remote storage, one hashes every object as it is written, one checks every read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import TYPE_CHECKING

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from moe_replay.archive.commits import StoredObject, sha256_hex
from moe_replay.archive.storage_errors import storage_errors
from moe_replay.archive.storage_retries import patiently_awaited

if TYPE_CHECKING:
    from typing import Self

Key = str
"""A zarr key, e.g. `ids/c/0/3/0`; the object path is `<prefix>/<key>`."""


class PatientStore(FsspecStore):
    """An FsspecStore that reads and writes patiently, and raises what `storage_errors` raises."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object or a range of it, None when there is none."""
        with storage_errors(f"reading {self.path}/{key}"):
            return await patiently_awaited(super().get, key, prototype, byte_range)

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write one object."""
        with storage_errors(f"writing {self.path}/{key} ({len(value):,} bytes)", creating=True):
            await patiently_awaited(super().set, key, value, byte_range)

    async def delete(self, key: str) -> None:
        """Remove one object; nothing happens when there is none."""
        with storage_errors(f"removing {self.path}/{key}"):
            await patiently_awaited(super().delete, key)


class HashingStore(WrapperStore[FsspecStore]):
    """Writes through to an FsspecStore and notes size and sha256 of every object in `written`."""

    def __init__(self, store: FsspecStore, prefix: str, written: dict[str, StoredObject]) -> None:
        super().__init__(store)
        self._prefix = prefix
        self._written = written

    def _with_store(self, store: FsspecStore) -> "Self":
        return type(self)(store, self._prefix, self._written)

    async def set(self, key: Key, value: Buffer) -> None:
        """Write one object and note it in the manifest."""
        data = value.to_bytes()
        path = f"{self._prefix}/{key}"
        entry = StoredObject(path=path, size=len(data), sha256=sha256_hex(data))
        with storage_errors(f"writing {path}", creating=True):
            await self._store.set(key, value)
        self._written[path] = entry

    async def set_if_not_exists(self, key: Key, value: Buffer) -> None:
        """Write one object unless this writer wrote it before."""
        if f"{self._prefix}/{key}" not in self._written:
            await self.set(key, value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        await asyncio.gather(*(self.set(key, value) for key, value in values))

    async def delete(self, key: Key) -> None:
        """Remove one object from storage and from the manifest."""
        with storage_errors(f"removing {self._prefix}/{key}"):
            await self._store.delete(key)
        self._written.pop(f"{self._prefix}/{key}", None)

    async def delete_dir(self, prefix: str) -> None:
        """Remove the objects below `prefix`, which may be empty for all of them."""
        below = f"{self._prefix}/{prefix}".rstrip("/") + "/"
        for path in [path for path in self._written if path.startswith(below)]:
            await self.delete(path[len(self._prefix) + 1 :])

    async def clear(self) -> None:
        """Remove every object of this store."""
        await self.delete_dir("")


class VerifyingStore(WrapperStore[FsspecStore]):
    """Read-only; hands out only objects of the manifest, whole and checked, and nothing else that lies there."""

    def __init__(self, store: FsspecStore, prefix: str, manifest: dict[str, StoredObject], folder: str) -> None:
        super().__init__(store)
        self._prefix = prefix
        self._manifest = manifest
        self._folder = folder

    def _with_store(self, store: FsspecStore) -> "Self":
        return type(self)(store, self._prefix, self._manifest, self._folder)

    async def get(self, key: Key, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object or a range of it; raises ArchiveCorrupt unless the whole object is as committed.

        A range costs a read of the whole object, since a part has no checksum of its own.
        """
        expected = self._manifest.get(f"{self._prefix}/{key}")
        if expected is None:
            return None
        with storage_errors(f"reading {expected.path}"):
            found = await self._store.get(key, prototype)
        data = None if found is None else found.to_bytes()
        whole = expected.checked(self._folder, data)
        return prototype.buffer.from_bytes(whole[_range_of(byte_range, len(whole))])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several checked ranges."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, part in requests:
            yield key, await self.get(key, prototype, part)

    async def exists(self, key: Key) -> bool:
        """Whether the manifest names the key."""
        return f"{self._prefix}/{key}" in self._manifest

    async def is_empty(self, prefix: str) -> bool:
        """Whether the manifest names nothing below `prefix`."""
        return not self._keys(prefix)

    def list(self) -> AsyncIterator[str]:
        """All keys of the manifest."""
        return _each(self._keys(""))

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """The manifest's keys that start with `prefix`."""
        return _each(self._keys(prefix))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below `prefix` in the manifest."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        return _each(sorted({key[len(folder) :].split("/")[0] for key in self._keys(folder)}))

    async def getsize(self, key: Key) -> int:
        """Size of an object in bytes, from the manifest."""
        expected = self._manifest.get(f"{self._prefix}/{key}")
        if expected is None:
            raise FileNotFoundError(key)
        return expected.size

    def _keys(self, prefix: str) -> "list[str]":
        start = f"{self._prefix}/"
        keys = (path[len(start) :] for path in self._manifest if path.startswith(start))
        return [key for key in keys if key.startswith(prefix)]


def _range_of(part: ByteRequest | None, size: int) -> slice:
    match part:
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix):
            return slice(max(0, size - suffix), None)
        case _:
            return slice(None)


async def _each(keys: "list[str]") -> AsyncIterator[str]:
    for key in keys:
        yield key
