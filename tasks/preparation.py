"""The task that makes a run ready."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from moe_replay.config import RunConfig
from moe_replay.preparation import prepare
from moe_replay.stages.run import Run
from tasks.progress import StageProgress
from tasks.retry import is_transient


@task(
    name="prepare", task_run_name="prepare-{run_id}", cache_policy=NO_CACHE, retries=1, retry_condition_fn=is_transient
)
def prepare_run(config: RunConfig, run_id: str, allow_config_change: Sequence[str] = ()) -> Run:
    """Check the inputs, fetch or make model and data, and create or reopen the run."""
    return prepare(config, run_id, StageProgress(run_id, "prepare", 0), allow_config_change)
