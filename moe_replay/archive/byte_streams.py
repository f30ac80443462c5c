"""Byte strings one after the other, each with its length and as zstd makes it, where that is smaller.

A stream is a little-endian u32 n and n >> 1 bytes: one zstd frame if n is odd, else the bytes themselves.
"""

import struct

import numcodecs.zstd as zstd
import numpy as np
import numpy.typing as npt

from moe_replay.errors import ArchiveCorrupt

_LENGTH = struct.Struct("<I")
_LEVEL = 1
"""The bytes of expert sets hardly have repeats that a higher level would find; it costs three times the time."""


class StreamWriter:
    """Collects streams."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, data: npt.NDArray[np.uint8], compress: bool = True) -> None:
        """Append one stream; `compress=False` for bytes known to be random."""
        frame = zstd.compress(np.ascontiguousarray(data), _LEVEL) if compress and data.nbytes else b""
        smaller = bool(frame) and len(frame) < data.nbytes
        stored = frame if smaller else data.tobytes()
        self._parts += [_LENGTH.pack(len(stored) << 1 | smaller), stored]

    def add_plane(self, numbers: npt.NDArray[np.uint8 | np.uint16], largest: int) -> None:
        """Append numbers of 0..`largest`: their low bytes and, if `largest` takes two bytes, their high ones."""
        self.add(numbers.astype(np.uint8))
        if largest > 255:
            self.add((numbers >> 8).astype(np.uint8))

    def extend(self, other: "StreamWriter") -> None:
        """Append another writer's streams."""
        self._parts += other._parts

    @property
    def num_bytes(self) -> int:
        """Of all streams."""
        return sum(map(len, self._parts))

    def to_bytes(self) -> bytes:
        """All streams."""
        return b"".join(self._parts)


class StreamReader:
    """Takes streams off in the order they were added; raises ArchiveCorrupt for what StreamWriter can't have made."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._rest = memoryview(data)

    def take(self, size: int | None = None) -> npt.NDArray[np.uint8]:
        """The next stream, writable, of `size` bytes; without `size`, of as many as it has, uncompressed.

        Never allocates more than `size` or what is there.
        """
        if len(self._rest) < _LENGTH.size:
            raise ArchiveCorrupt(f"coded rows end after {len(self._rest)} bytes of a stream's length; {WAY_OUT}")
        (marked,) = _LENGTH.unpack(self._rest[: _LENGTH.size])
        length, compressed = marked >> 1, marked & 1
        stored = self._rest[_LENGTH.size :][:length]
        found = "compressed" if compressed else length
        wrong = (size is None and compressed) or (size is not None and not compressed and length != size)
        if len(stored) < length or wrong:
            raise ArchiveCorrupt(
                f"a stream of coded rows should have {size if size is not None else 'some'} bytes; it has {found}, "
                f"{len(stored)} of them are there; {WAY_OUT}"
            )
        self._rest = self._rest[_LENGTH.size + length :]
        return _decompressed(stored, size) if compressed and size is not None else np.array(stored, dtype=np.uint8)

    def take_plane(self, count: int, largest: int) -> npt.NDArray[np.uint8 | np.uint16]:
        """The next `count` numbers that `add_plane` was given with the same `largest`."""
        numbers: npt.NDArray[np.uint8 | np.uint16] = self.take(count)
        if largest > 255:
            numbers = numbers + np.uint16(256) * self.take(count)
        if (numbers > largest).any():
            raise ArchiveCorrupt(f"coded rows have {numbers.max()} where at most {largest} is possible; {WAY_OUT}")
        return numbers

    def finish(self) -> None:
        """Raise ArchiveCorrupt if anything is left."""
        if len(self._rest):
            raise ArchiveCorrupt(f"{len(self._rest)} bytes follow the last stream of coded rows; {WAY_OUT}")


WAY_OUT = "the chunk is damaged: restore it, or delete the stage's folder and resume the run to make it again"


def _decompressed(frame: memoryview, size: int) -> npt.NDArray[np.uint8]:
    # Zeros, since zstd fills only what the frame claims to hold.
    data = np.zeros(size, dtype=np.uint8)
    try:
        zstd.decompress(np.frombuffer(frame, dtype=np.uint8), data)
    except (RuntimeError, ValueError) as error:
        raise ArchiveCorrupt(f"a stream of coded rows is no zstd frame of {size} bytes; {WAY_OUT}") from error
    return data
