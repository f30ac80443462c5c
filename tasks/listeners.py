"""Whoever in this process wants to hear of what tasks do, such as the display of a command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, ParamSpec

P = ParamSpec("P")


class Listeners(Generic[P]):
    """Those who hear of one kind of news, in the order in which they came."""

    def __init__(self) -> None:
        self._listeners: list[Callable[P, None]] = []

    @contextmanager
    def hearing(self, listener: Callable[P, None]) -> Iterator[None]:
        """Have `listener` told until the block ends."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def tell(self, *news: P.args, **named: P.kwargs) -> None:
        """Call each of them."""
        for listener in self._listeners:
            listener(*news, **named)
