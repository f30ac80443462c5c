"""Stages that work beside others: the next rollout beside training, evaluation beside the fit of a predictor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

from prefect import get_run_logger
from prefect.futures import PrefectFuture

from moe_replay.archive.commits import ArtifactRef
from moe_replay.errors import LeaseLost
from moe_replay.interrupts import raise_lost_interrupt
from moe_replay.stages.run import Run
from tasks.engines import engines_of

Submit = Callable[[], PrefectFuture[ArtifactRef]]
"""Has a stage begin in another thread."""


@contextmanager
def beside(run: Run, submit: Submit | None) -> Iterator[PrefectFuture[ArtifactRef] | None]:
    """Begin a stage before the block, and end the block when the stage has ended too; nothing without one.

    Where the block fails, the stage is waited for all the same, so that what it took is committed; the block's error is
    the one that is raised. Where the block is interrupted, or another runner took the run over, the run's engines are
    stopped, and with them the stage.
    """
    if submit is None:
        yield None
        return
    ended = Event()
    try:
        stage = submit()
        # To ask Prefect whether it has ended is a request to its server, which may fail.
        stage.add_done_callback(lambda _: ended.set())
        try:
            yield stage
        except LeaseLost:
            engines_of(run).end()
            raise
        except Exception as error:
            raise_lost_interrupt()
            if not ended.is_set():
                get_run_logger().error("%s: %s; the stage beside it is waited for", type(error).__name__, error)
            stage.wait()
            raise
        stage.result()
    except BaseException as error:
        # Leaving a flow waits for its threads, which would end their stages first.
        if not isinstance(error, Exception):
            engines_of(run).end()
        raise
