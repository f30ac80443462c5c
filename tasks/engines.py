"""The engines of the runs that this process works on.

Engines can't be parameters of tasks, which Prefect records; tasks name the run and find its engines here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from moe_replay.engines.pool import EnginePool
from moe_replay.stages.run import Run

_pools: dict[str, EnginePool] = {}


def engines_of(run: Run) -> EnginePool:
    """The run's engines; none is started before it is used."""
    key = f"{run.root}/{run.run_id}"
    if key not in _pools:
        _pools[key] = EnginePool(run.model, run.model_sha256, run.config, run.home / "logs" / run.run_id)
    return _pools[key]


@contextmanager
def running_engines(run: Run) -> Iterator[EnginePool]:
    """Start building the run's engines in the background, and stop them at the end, however it comes."""
    pool = engines_of(run)
    if not run.is_complete():
        pool.start()
    try:
        yield pool
    finally:
        _pools.pop(f"{run.root}/{run.run_id}").close()
