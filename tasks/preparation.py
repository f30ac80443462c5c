"""The tasks that make a run, or an evaluation, ready, and the hold on a run before and after it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from moe_replay import evaluations
from moe_replay.config import RunConfig
from moe_replay.evaluations import Evaluation, EvaluationRequest
from moe_replay.holding import holding_run
from moe_replay.preparation import prepare
from moe_replay.stages.run import Run
from tasks.events import telling_stage
from tasks.progress import StageProgress
from tasks.retry import is_transient


@task(
    name="prepare", task_run_name="prepare-{run_id}", cache_policy=NO_CACHE, retries=1, retry_condition_fn=is_transient
)
def prepare_run(config: RunConfig, run_id: str, allow_config_change: Sequence[str] = ()) -> Run:
    """Check the inputs, fetch or make model and data, and create or reopen the run."""
    with telling_stage(run_id, "prepare", 0):
        return prepare(config, run_id, StageProgress(run_id, "prepare", 0), allow_config_change)


@task(name="prepare evaluation", cache_policy=NO_CACHE, retries=1, retry_condition_fn=is_transient)
def prepare_evaluation(request: EvaluationRequest, evaluation_id: str) -> Evaluation:
    """Find the checkpoint, fetch or make model and benchmarks, and create or reopen the evaluation."""
    with telling_stage(evaluation_id, "prepare", 0):
        return evaluations.prepare_evaluation(request, evaluation_id, StageProgress(evaluation_id, "prepare", 0))


@contextmanager
def prepared_run(config: RunConfig, run_id: str, allow_config_change: Sequence[str] = ()) -> Iterator[Run]:
    """The run, prepared, and no other runner's for as long as the block. Raises RunInUse when another has it."""
    with holding_run(config, run_id, _telling(run_id)):
        yield prepare_run(config, run_id, allow_config_change)


@contextmanager
def prepared_evaluation(request: EvaluationRequest, evaluation_id: str | None) -> Iterator[Evaluation]:
    """The evaluation, prepared, and no other runner's for as long as the block; RunInUse when another has it."""
    own_id = evaluations.id_of(request, evaluation_id)
    with holding_run(RunConfig(storage=request.storage), own_id, _telling(own_id)):
        yield prepare_evaluation(request, own_id)


def _telling(run_id: str) -> Callable[[str], None]:
    """What says in the flow run's log and to who listens that a silent runner is waited for."""
    waiting = StageProgress(run_id, "lease", 0)

    def tell(what: str) -> None:
        get_run_logger().info(what)
        waiting(0, 0, what)

    return tell
