"""Patience with remote stores: what their clients leave is tried again, a few times and ever more slowly.

botocore repeats single requests. A body cut in the middle, an upload whose end was never answered, and an outage
longer than its patience need the whole operation once more.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from moe_replay.archive.storage_errors import may_pass, storage_errors

RETRIES = 5
LONGEST_FIRST_WAIT = 1.0
"""Seconds; the longest wait doubles with each retry, and each wait is drawn evenly from 0 to it."""

_logger = logging.getLogger(__name__)
T = TypeVar("T")


def patiently(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`call(*args, **kwargs)`, tried again after failures that may pass."""
    for wait in _waits():
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not may_pass(error):
                raise
            _tell(error, wait)
        time.sleep(wait)
    return call(*args, **kwargs)


async def patiently_awaited(call: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
    """`await call(*args, **kwargs)`, tried again after failures that may pass."""
    for wait in _waits():
        try:
            return await call(*args, **kwargs)
        except Exception as error:
            if not may_pass(error):
                raise
            _tell(error, wait)
        await asyncio.sleep(wait)
    return await call(*args, **kwargs)


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


def _waits() -> Iterator[float]:
    for retry in range(RETRIES):
        # Drawn evenly, so that many clients that failed together do not come back together.
        yield random.uniform(0, LONGEST_FIRST_WAIT * 2**retry)  # noqa: S311


def _tell(error: Exception, wait: float) -> None:
    _logger.warning("storage failed (%s), trying again in %.1f s", type(error).__name__, wait)
