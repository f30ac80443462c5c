"""Stages that work beside others: the next rollout beside training, evaluation beside the fit of a predictor."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.futures import PrefectFuture

from moe_replay.archive.commits import ArtifactRef
from moe_replay.interrupts import raise_lost_interrupt
from moe_replay.stages.run import Run
from tasks.engines import engines_of


@contextmanager
def beside(run: Run, stage: PrefectFuture[ArtifactRef] | None) -> Iterator[None]:
    """End the block when a stage that was submitted has ended too, and fail if that did; nothing where there is none.

    Where the block fails, the stage is waited for all the same, so that what it took is committed; where the block is
    interrupted, the run's engines are stopped, and with them the stage.
    """
    if stage is None:
        yield
        return
    try:
        try:
            yield
        except Exception:
            raise_lost_interrupt()
            stage.wait()
            raise
        stage.result()
    except BaseException as error:
        if not isinstance(error, Exception):
            engines_of(run).end()
        raise
