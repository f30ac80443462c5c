"""What is still to be done of a run, from storage alone."""

from moe_replay.archive.artifacts import RunStore
from moe_replay.plan import RunPlan
from moe_replay.stages.decisions import is_skipped


def missing_stages(store: RunStore, plan: RunPlan, iteration: int) -> list[str]:
    """The stages of an iteration that are not committed, in order; asked of the last it tells if a run is complete."""
    missing = [stage for stage in plan.stages(iteration) if store.commit_of(stage, iteration) is None]
    if "predictor" in missing and "training" not in missing:
        training = store.committed("training", iteration)
        # A batch that was left out moved no router, so nothing is fitted.
        if training is not None and is_skipped(training):
            missing.remove("predictor")
    return missing
