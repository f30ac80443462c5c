"""One thin task a stage: references in, a reference out; the work is done by `moe_replay.stages`.

Storage decides whether a stage has to run: Prefect's own result cache is off, so that a retried flow run, a new
deployment run and an empty Prefect database all do the same.
"""

from collections.abc import Callable, Mapping
from typing import NoReturn

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from moe_replay.archive.commits import ArtifactRef
from moe_replay.engines.pool import EnginePool
from moe_replay.errors import OutOfMemory, StabilityAlarm
from moe_replay.holding import require_lease
from moe_replay.interrupts import raise_lost_interrupt
from moe_replay.sections import StagesConfig
from moe_replay.stages.run import Run
from tasks.engines import engines_of
from tasks.events import telling_stage
from tasks.progress import StageProgress
from tasks.retry import is_transient
from tasks.timeouts import trust_timeouts


def configured(stage: Task[..., ArtifactRef], settings: StagesConfig) -> Task[..., ArtifactRef]:
    """The task with the run's own retries and time-out."""
    trust_timeouts()
    delays = [settings.retry_delay_seconds * 2**attempt for attempt in range(settings.retries)]
    return stage.with_options(
        retries=settings.retries, retry_delay_seconds=delays, timeout_seconds=settings.timeout_seconds
    )


@task(name="rollout", task_run_name="rollout-{iteration}", cache_policy=NO_CACHE, retry_condition_fn=is_transient)
def generate_rollouts(
    run: Run,
    iteration: int,
    policy: ArtifactRef,
    predictor: ArtifactRef | None = None,
    carried: ArtifactRef | None = None,
) -> ArtifactRef:
    """Sample responses with vLLM, score them, and keep their log-probs and routes; under a predictor's, where given.

    Partial rollouts go on with what the rollout before, `carried`, left unfinished.
    """
    inputs = {"policy": policy, "predictor": predictor, "carried": carried}
    return _on_engine(run, "rollout", iteration, inputs, "rollout", "rollout:generate_rollouts")


@task(name="routes", task_run_name="routes-{iteration}", cache_policy=NO_CACHE, retry_condition_fn=is_transient)
def archive_routes(run: Run, iteration: int, rollout: ArtifactRef) -> ArtifactRef:
    """Check the rollout's routes against its tokens and write the routing archive."""
    from moe_replay.stages import routes

    return _unless_committed(
        run, "routes", iteration, {"rollout": rollout}, lambda: routes.archive_routes(run, iteration, rollout)
    )


@task(name="training", task_run_name="training-{iteration}", cache_policy=NO_CACHE, retry_condition_fn=is_transient)
def train_replayed(
    run: Run,
    iteration: int,
    policy: ArtifactRef,
    rollout: ArtifactRef,
    routes: ArtifactRef,
    predictor: ArtifactRef | None = None,
) -> ArtifactRef:
    """Take the mini-steps with verl under the method's routes, and write the next policy and router evolution."""
    inputs = {"policy": policy, "rollout": rollout, "routes": routes, "predictor": predictor}
    return _on_engine(run, "training", iteration, inputs, "training", "training:train_replayed")


@task(name="predictor", task_run_name="predictor-{iteration}", cache_policy=NO_CACHE, retry_condition_fn=is_transient)
def fit_predictor(
    run: Run, iteration: int, trainings: tuple[ArtifactRef, ...], previous: ArtifactRef | None
) -> ArtifactRef:
    """Fit the routers' evolution predictors from the evolution that `trainings`, newest first, recorded."""
    # Apart from the engines: it needs torch alone, and no weights.
    from moe_replay.stages import predictor

    return _unless_committed(
        run,
        "predictor",
        iteration,
        predictor.inputs_of(trainings, previous),
        lambda: predictor.fit_predictor(run, iteration, trainings, previous),
    )


@task(name="evaluation", task_run_name="evaluation-{iteration}", cache_policy=NO_CACHE, retry_condition_fn=is_transient)
def evaluate_policy(run: Run, iteration: int, policy: ArtifactRef) -> ArtifactRef:
    """Score a policy on the benchmarks with vLLM."""
    return _on_engine(run, "evaluation", iteration, {"policy": policy}, "rollout", "evaluation:evaluate_policy")


def _on_engine(
    run: Run, stage: str, iteration: int, inputs: Mapping[str, ArtifactRef | None], engine: str, function: str
) -> ArtifactRef:
    """Run a stage's function in the process of an engine; whatever goes wrong, the next attempt gets a clean one.

    The function takes `inputs` in their order, none for those that there are not.
    The stability alarm goes off before anything is changed, so the engine stays.
    """
    pool = engines_of(run)

    def work() -> ArtifactRef:
        process = pool.rollout() if engine == "rollout" else pool.training()
        progress = StageProgress(run.run_id, stage, iteration)
        # An engine may have been built for minutes.
        require_lease(run.store())
        try:
            made = process.call(f"moe_replay.stages.{function}", progress, run, iteration, *inputs.values())
        except StabilityAlarm:
            raise
        except BaseException as error:
            progress(0, 0, f"stopped by {type(error).__name__}")
            pool.discard(engine)
            if isinstance(error, OutOfMemory):
                _give_less(pool, engine, run, error)
            raise
        progress.finish()
        return made

    given = {name: ref for name, ref in inputs.items() if ref is not None}
    return _unless_committed(run, stage, iteration, given, work)


def _give_less(pool: EnginePool, engine: str, run: Run, failed: OutOfMemory) -> NoReturn:
    """Prepare the next attempt after memory ran out, and raise what says so and what else would help."""
    if engine == "rollout":
        share = run.config.rollout.memory_fraction
        raise OutOfMemory(
            f"{failed}. rollout.memory_fraction = {share} is the share of a GPU that the rollout engine takes: lower "
            "it where training needs more of the rest, raise it where model and cache do not fit; on a CPU, free memory"
        ) from failed
    settings = run.config.rollout
    smaller = pool.take_smaller_micro_batches(failed, settings.max_prompt_tokens + settings.max_response_tokens)
    get_run_logger().warning("%s; from now on micro-batches hold up to %d tokens", failed, smaller)
    raise OutOfMemory(
        f"{failed}; another attempt takes micro-batches of up to {smaller}: allow more attempts with stages.retries "
        f"(now {run.config.stages.retries}), or give it more memory",
        failed.micro_batch_tokens,
    ) from failed


def _unless_committed(
    run: Run, stage: str, iteration: int, inputs: dict[str, ArtifactRef], work: Callable[[], ArtifactRef]
) -> ArtifactRef:
    raise_lost_interrupt()
    require_lease(run.store())
    found = run.find(stage, iteration, inputs)
    if found is not None:
        get_run_logger().info("%s of iteration %d is committed already, skipped", stage, iteration)
        return found
    # Reading the commit may have taken long, and so does the work.
    require_lease(run.store())
    with telling_stage(run.run_id, stage, iteration):
        made = work()
    require_lease(run.store())
    return made
