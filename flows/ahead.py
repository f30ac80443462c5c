"""Rollouts one step off: the next batch is sampled while this one is trained on, of the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.futures import PrefectFuture

from moe_replay.archive.commits import ArtifactRef
from moe_replay.interrupts import raise_lost_interrupt
from moe_replay.stages.run import Run
from tasks.engines import engines_of
from tasks.stages import configured, generate_rollouts


@contextmanager
def rolling_out_ahead(
    run: Run, iteration: int, policy: ArtifactRef, carried: ArtifactRef | None
) -> Iterator[PrefectFuture[ArtifactRef] | None]:
    """Have an iteration's batch sampled beside the block, which ends when that is done too.

    None where rollouts are not one step off, and after the last iteration. Where the block fails, the rollout is
    waited for all the same, so that what it took is committed; where it is interrupted, the rollout is broken off.
    """
    if not run.config.rollout.one_step_off or iteration not in run.plan.iterations:
        yield None
        return
    ahead = configured(generate_rollouts, run.config.stages).submit(run, iteration, policy, None, carried)
    try:
        try:
            yield ahead
        except Exception:
            raise_lost_interrupt()
            ahead.wait()
            raise
        ahead.result()
    except BaseException as error:
        if not isinstance(error, Exception):
            engines_of(run).end()
        raise
