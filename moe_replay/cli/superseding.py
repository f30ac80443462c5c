"""`moe-replay resume --from-stage`: take back a stage and all that was made from it, so that they are made again."""

import sys
from collections import defaultdict
from collections.abc import Sequence

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.superseding import made_from, require_remakeable, supersede
from moe_replay.cli.console import err
from moe_replay.errors import ConfigError
from moe_replay.holding import require_lease
from moe_replay.plan import RunPlan


def supersede_from(store: RunStore, stage: str, iteration: int, agreed: bool, quiet: bool = False) -> None:
    """Say what is taken back, ask unless it is `agreed`, and take it back.

    Raises ConfigError where the run has no such stage, it could not be made again, or nobody agrees.
    """
    plan = RunPlan.stored(store)
    if iteration not in plan.iterations:
        raise ConfigError(
            f"run {store.run_id} has no iteration {iteration}: it has {plan.iterations[0]} to {plan.iterations[-1]}"
        )
    if stage not in plan.stages(iteration):
        has = ", ".join(plan.stages(iteration))
        raise ConfigError(f"iteration {iteration} of run {store.run_id} has no stage {stage!r}; it has {has}")
    found = made_from(store, stage, iteration)
    if not found:
        if not quiet:
            _say(f"{stage} of iteration {iteration} is not committed: nothing to supersede, the run goes on")
        return
    require_remakeable(store, found)
    if not (quiet and agreed):
        _say(f"supersedes {_described(found)}. `archive gc` keeps {'them' if len(found) > 1 else 'it'} for a while")
    if not agreed:
        _require_agreement()
    # The answer may have taken so long that another runner went on.
    require_lease(store)
    supersede(store, found)


def _require_agreement() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here, so nothing was superseded; agree beforehand with --yes")
    _say("go on? [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("not confirmed, so nothing was superseded; --yes answers beforehand")


def _described(found: Sequence[Artifact]) -> str:
    """What is superseded, by iteration."""
    by_iteration: dict[int, list[str]] = defaultdict(list)
    for artifact in reversed(found):
        by_iteration[artifact.commit.iteration].append(artifact.commit.stage)
    return "; ".join(f"{', '.join(stages)} of iteration {iteration}" for iteration, stages in by_iteration.items())


def _say(told: str, end: str = "\n") -> None:
    err.print(told, highlight=False, markup=False, soft_wrap=True, end=end)
