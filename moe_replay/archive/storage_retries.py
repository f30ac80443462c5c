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

from moe_replay.archive.storage_errors import may_pass

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


def _waits() -> Iterator[float]:
    for retry in range(RETRIES):
        # Drawn evenly, so that many clients that failed together do not come back together.
        yield random.uniform(0, LONGEST_FIRST_WAIT * 2**retry)  # noqa: S311


def _tell(error: Exception, wait: float) -> None:
    _logger.warning("storage failed (%s), trying again in %.1f s", type(error).__name__, wait)
