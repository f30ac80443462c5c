"""Reading the next part while the present one is worked on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Part = TypeVar("Part")


def read_ahead(read: Callable[[Key], Part], keys: Sequence[Key]) -> Iterator[Part]:
    """`read(key)` of each key, in order; the next is being read in a thread while the caller works on the last.

    At most two parts are held at a time. What a read raises is raised where its part would have come.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        ahead = [reader.submit(read, key) for key in keys[:1]]
        for key in keys[1:]:
            part = ahead.pop().result()
            ahead.append(reader.submit(read, key))
            yield part
            del part
        for last in ahead:
            yield last.result()
