"""The training loop: rollout, routing archive, replayed training, predictor fitting, evaluation; again."""

from functools import partial
from typing import NamedTuple

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from flows.beside import Submit, beside
from flows.stability import train_watched
from flows.telling import Telling
from moe_replay.archive.commits import ArtifactRef
from moe_replay.config import RunConfig
from moe_replay.interrupts import raise_lost_interrupt
from moe_replay.stages.decisions import is_skipped
from moe_replay.stages.run import Run
from tasks.dashboard import refreshing_dashboard
from tasks.engines import running_engines
from tasks.failures import LOGGED_FAILURES
from tasks.heartbeats import sending_heartbeats, taking_over_heartbeats
from tasks.naming import own_run_id, training_name
from tasks.preparation import prepared_run
from tasks.stages import archive_routes, configured, evaluate_policy, fit_predictor, generate_rollouts
from tasks.tracking.steps import close_tracking, open_tracking, recording_system_metrics


class Learned(NamedTuple):
    """What one iteration hands to the next."""

    policy: ArtifactRef
    predictor: ArtifactRef | None = None
    """Of the routers of `policy`; none before the first fit, and under methods without one."""
    trainings: tuple[ArtifactRef, ...] = ()
    """Newest first, as many as a predictor is fitted from."""
    carried: ArtifactRef | None = None
    """The rollout whose unfinished responses are gone on with; none before the first, and without partial rollouts."""
    rollout: ArtifactRef | None = None
    """Of the next iteration, where it was made beside this one."""


@flow(name="train", flow_run_name=training_name, persist_result=False, **LOGGED_FAILURES)
def train(
    config: RunConfig = RunConfig(),  # noqa: B008 (frozen)
    run_id: str | None = None,
    allow_config_change: list[str] = [],  # noqa: B006 (never changed)
) -> dict[str, str]:
    """Train a Mixture-of-Experts policy with routing replay.

    Args:
        config: The run's settings.
        run_id: The same continues a run at its first stage without a commit. Without one the flow run's own name is
            taken, so that retrying the flow run continues it too. A run that another runner works on is refused.
        allow_config_change: Keys in which the config of a run that exists may change: `iterations`, `evaluation` or
            any below it. With a change of any other the run is refused.

    Returns:
        `run_id`, `root` and `mlflow_run_id`.
    """
    with prepared_run(config, own_run_id(), allow_config_change) as run, running_engines(run):
        tracked = open_tracking(run)
        succeeded = False
        try:
            learned, telling = start_of(run), Telling(run, tracked)
            with (
                recording_system_metrics(run, tracked),
                refreshing_dashboard(run, tracked) as refresh,
                taking_over_heartbeats(),
            ):
                for n in run.plan.iterations:
                    # Begun before the iteration's own flow run, whose start takes about as long as a small rollout.
                    with beside(run, rollout_of(run, n, learned)) as begun:
                        telling.catch_up()
                        learned = iterate(run, n, learned, quote(begun))
                    telling.ended(n)
                    refresh(n)
                telling.catch_up()
            succeeded = True
        finally:
            close_tracking(run, tracked, succeeded)
    return {"run_id": run.run_id, "root": run.root, "mlflow_run_id": tracked}


def start_of(run: Run) -> Learned:
    """What the first iteration starts from: the model, or what another run had learned where this one was forked."""
    fork = run.forked_from
    return Learned(fork.policy, fork.predictor, fork.trainings, fork.carried) if fork else Learned(run.initial_policy)


def rollout_of(run: Run, n: int, before: Learned) -> Submit | None:
    """Begins the iteration's rollout; none where it was made beside the training before."""
    if before.rollout is not None:
        return None
    predictor = before.predictor if run.config.method.route_source == "rollout" else None
    roll_out = configured(generate_rollouts, run.config.stages)
    return partial(roll_out.submit, run, n, before.policy, predictor, before.carried)


@flow(name="iteration", flow_run_name="{run.run_id}-{n}", persist_result=False)
@sending_heartbeats()
def iterate(run: Run, n: int, before: Learned, begun: PrefectFuture[ArtifactRef] | None) -> Learned:
    """Archive the routes of the rollout that was begun, train under them, fit the predictor, evaluate."""
    config, method = run.config, run.config.method
    roll_out, evaluate = (configured(stage, config.stages) for stage in (generate_rollouts, evaluate_policy))
    # The pass whose routes are replayed is the one that is predicted.
    at_old_pass = before.predictor if method.route_source == "old_log_prob" else None

    # What was dropped since the rollout was begun would be met after it.
    raise_lost_interrupt()
    rollout = begun.result() if begun else before.rollout
    assert rollout is not None
    carried = rollout if config.rollout.partial_response_tokens else None
    goes_ahead, evaluates = run.plan.rolls_out_beside(n), run.plan.evaluates(n)
    roll_out_next = partial(roll_out.submit, run, n + 1, before.policy, None, carried)
    with beside(run, roll_out_next if goes_ahead else None) as ahead:
        routes = configured(archive_routes, config.stages)(run, n, rollout)
        policy = train_watched(run, n, before.policy, rollout, routes, at_old_pass, ahead)
        predictor, trainings = None, (policy, *before.trainings)[: config.predictor.window]
        # One engine samples for both: behind a rollout ahead the evaluation waits its turn.
        with beside(run, partial(evaluate.submit, run, n, policy) if evaluates and not goes_ahead else None):
            # A batch that was left out moved no router: there is nothing to fit, and the next rollout goes without.
            if method.predictor and not is_skipped(run.open(policy)):
                predictor = configured(fit_predictor, config.stages)(run, n, trainings, before.predictor)
    if evaluates and goes_ahead:
        evaluate(run, n, policy)
    return Learned(policy, predictor, trainings, carried, ahead and ahead.result())
