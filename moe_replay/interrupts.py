"""Interrupts that libraries lose on the way."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt for every error that came of one.

    What Prefect does about an interrupt may fail in its turn, wherever the interrupt came, and then an ordinary error
    of Prefect's own leaves the flow, which would pass for a failed run.
    """
    try:
        yield
    except Exception as error:
        if _came_of_interrupt(error):
            raise KeyboardInterrupt from error
        raise


def _came_of_interrupt(error: BaseException) -> bool:
    seen: set[int] = set()
    before: BaseException | None = error
    while before is not None and id(before) not in seen:
        if isinstance(before, KeyboardInterrupt):
            return True
        seen.add(id(before))
        before = before.__cause__ or before.__context__
    return False
