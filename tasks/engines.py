"""The engines of the runs that this process works on.

Engines can't be parameters of tasks, which Prefect records; tasks name the run and find its engines here. Several runs
one after the other may keep them (`keeping_engines`): an engine holds nothing of a run but weights, named by what they
are, and takes method and temperature with each call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from moe_replay.engines.pool import EnginePool
from moe_replay.stages.run import Run

_pools: dict[str, EnginePool] = {}
_users: list[str] = []
"""Keys of the pools in use, once for each run at work."""
_keepers: list[object] = []


def engines_of(run: Run) -> EnginePool:
    """The run's engines; none is started before it is used."""
    key = _key(run)
    if key not in _pools:
        logs = run.home / "logs" / run.run_id
        config = run.config
        _pools[key] = EnginePool(run.model, run.model_sha256, config.rollout, config.training, logs, config.resources)
    return _pools[key]


@contextmanager
def running_engines(run: Run, trains: bool = True) -> Iterator[EnginePool]:
    """Start building the run's engines in the background, and stop them when no run uses them, however it ends.

    For a run that does not train, an engine is built when a stage first needs it.
    """
    key = _key(run)
    if key in _pools and _pools[key].ended and key not in _users:
        # Kept from a run that was broken off; threads of that one must not find a fresh one before they end.
        del _pools[key]
    pool = engines_of(run)
    if trains and not run.is_complete():
        pool.start()
    _users.append(key)
    try:
        yield pool
    finally:
        _users.remove(key)
        if not _keepers:
            _close_unused()


@contextmanager
def keeping_engines() -> Iterator[None]:
    """Keep engines from run to run of one model and the same settings of both engines; one run at a time."""
    keeper = object()
    _keepers.append(keeper)
    try:
        yield
    finally:
        _keepers.remove(keeper)
        if not _keepers:
            _close_unused()


def _key(run: Run) -> str:
    """Runs at work at the same time have engines of their own; a process can answer one caller at a time."""
    if not _keepers:
        return f"{run.root}/{run.run_id}"
    sections = {"rollout", "training", "resources"}
    # When a batch is sampled is nothing to the engine that samples it.
    settings = run.config.model_dump_json(include=sections, exclude={"rollout": {"one_step_off"}})
    return f"{run.model} {run.model_sha256} {settings}"


def _close_unused() -> None:
    for key in [key for key in _pools if key not in _users]:
        _pools.pop(key).close()
