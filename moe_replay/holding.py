"""The lease of the run that this process works on: one runner at a time, see `moe_replay.archive.lease`.

A command takes it before it starts anything, so that a second runner is refused at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.lease import Lease, holding
from moe_replay.config import RunConfig
from moe_replay.places import run_root

_leases: dict[str, Lease] = {}
"""By the run's URL. Tasks may run in other threads than their flow."""
_held_here: ContextVar[frozenset[str]] = ContextVar("held_here", default=frozenset())
"""URLs of the runs that this block of code, or one around it, holds. Another flow in this process is another runner."""


@contextmanager
def holding_run(config: RunConfig, run_id: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Keep other runners from the run for as long as the block; a block within such a block does nothing more.

    `tell` is called while it waits to know whether a silent runner is dead. Raises RunInUse when another one works on
    the run.
    """
    store = RunStore(run_root(config), run_id)
    if store.name in _held_here.get():
        yield
        return
    with holding(store.folder, tell) as lease:
        _leases[store.name] = lease
        before = _held_here.set(_held_here.get() | {store.name})
        try:
            yield
        finally:
            _held_here.reset(before)
            del _leases[store.name]


def require_lease(store: RunStore) -> None:
    """Raise LeaseLost when another runner took the run over; nothing where this process holds none, as a Ray node."""
    if lease := _leases.get(store.name):
        lease.require()
