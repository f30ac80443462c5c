"""A run at one moment: what is committed of it, who runs it, what is next; from storage alone."""

from typing import Any, NamedTuple

from moe_replay.archive.artifacts import RunStore, StageStatus
from moe_replay.archive.claims import Claim, find_holder
from moe_replay.archive.layout import EVALUATES_KEY, IMPORTS_KEY
from moe_replay.archive.superseding import generation_in
from moe_replay.plan import RunPlan
from moe_replay.stages.completion import missing_stages
from moe_replay.stages.decisions import Alarm, waiting_batch


class RunOverview(NamedTuple):
    """What `moe-replay status` shows."""

    plan: RunPlan | None
    """None of imported routes and of evaluations, which are never complete."""
    stages: tuple[StageStatus, ...]
    """By iteration and stage, those that the run has."""
    runner: Claim | None
    following: tuple[int, str] | None
    """Iteration and stage that is made next; none of a complete run, or one that has no plan."""
    beside: tuple[int, str] | None
    """What is made at the same time, where rollouts are one step off."""
    alarm: Alarm | None
    """Why the run waits for a decision."""
    generation: int
    """How often something of the run was superseded."""

    @classmethod
    def of(cls, store: RunStore, before: "RunOverview | None" = None) -> "RunOverview":
        """Look at storage; iterations that were complete `before` are not looked at again.

        Raises ConfigError when there is no such run, ArchiveCorrupt when its document or a commit is damaged.
        """
        document = store.read_run()
        plan = None if {IMPORTS_KEY, EVALUATES_KEY}.intersection(document) else RunPlan.of(store, document)
        generation = generation_in(document)
        known = before.settled() if before and before.generation == generation else {}
        found = {n: known.get(n) or store.status(n) for n in store.iterations()}
        following = _following(store, plan, found) if plan else None
        batch = waiting_batch(store) if following and following[1] == "training" else None
        alarm = batch.waiting() if batch and following and batch.iteration == following[0] else None
        stages = [one for n, ours in found.items() for one in ours if _has(plan, document, n, one)]
        beside = _beside(plan, found, following) if plan and following else None
        return cls(plan, tuple(stages), find_holder(store.folder), following, beside, alarm, generation)

    def settled(self) -> dict[int, list[StageStatus]]:
        """Stages of the iterations before the one at work, where nothing changes but by superseding."""
        found: dict[int, list[StageStatus]] = {}
        for one in self.stages:
            if self.following and one.iteration < self.following[0]:
                found.setdefault(one.iteration, []).append(one)
        return found

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self.plan is not None and self.following is None and self.runner is None

    @property
    def is_stopped(self) -> bool:
        """Whether a batch waits for a decision and nobody works on the run."""
        return self.alarm is not None and self.runner is None


def _has(plan: RunPlan | None, document: dict[str, Any], iteration: int, stage: StageStatus) -> bool:
    """Whether a stage is one of the run's; what is committed always is."""
    if stage.state == "committed":
        return True
    if plan is not None:
        return iteration in plan.iterations and stage.stage in plan.stages(iteration)
    return EVALUATES_KEY in document and stage.stage == "evaluation"


def _following(store: RunStore, plan: RunPlan, found: dict[int, list[StageStatus]]) -> tuple[int, str] | None:
    """The first that is missing, which is not of the newest iteration where that has its rollout alone."""
    for n in plan.iterations:
        committed = {one.stage for one in found.get(n, []) if one.state == "committed"}
        if committed >= set(plan.stages(n)):
            continue
        if missing := missing_stages(store, plan, n) if committed else plan.stages(n):
            return n, missing[0]
    return None


def _beside(plan: RunPlan, found: dict[int, list[StageStatus]], following: tuple[int, str]) -> tuple[int, str] | None:
    """The rollout of the next iteration, between that of this one and the end of its predictor's fit."""
    n, stage = following
    if stage in ("rollout", "evaluation") or not plan.rolls_out_beside(n):
        return None
    is_made = any(one.stage == "rollout" and one.state == "committed" for one in found.get(n + 1, []))
    return None if is_made else (n + 1, "rollout")
