"""Training under the stability alarm: a batch that passes a bound is not trained on before that is decided."""

from prefect.exceptions import FlowPauseTimeout
from prefect.futures import PrefectFuture

from moe_replay.alarm import Action
from moe_replay.archive.commits import ArtifactRef
from moe_replay.errors import ConfigError, StabilityAlarm
from moe_replay.stages.decisions import Alarm, BatchAlarms, DecidedBy
from moe_replay.stages.run import Run
from tasks.stability import announce, ask, is_deployed, report
from tasks.stages import configured, train_replayed


def train_watched(
    run: Run,
    n: int,
    policy: ArtifactRef,
    rollout: ArtifactRef,
    routes: ArtifactRef,
    predictor: ArtifactRef | None,
    ahead: PrefectFuture[ArtifactRef] | None,
) -> ArtifactRef:
    """Train; where the alarm stops it, have it decided what becomes of the batch, and train as was decided.

    `ahead` is a rollout at work meanwhile, which ends before somebody is asked: engines give back their memory then.
    Raises StabilityAlarm when nobody is there to decide, or nobody did in time.
    """
    while True:
        try:
            return configured(train_replayed, run.config.stages)(run, n, policy, rollout, routes, predictor)
        except StabilityAlarm as error:
            settle(run, BatchAlarms(run.store(), n, rollout), error, ahead)


def settle(run: Run, batch: BatchAlarms, error: StabilityAlarm, ahead: PrefectFuture[ArtifactRef] | None) -> None:
    """Decide by rule, or have a person decide in the Prefect UI; raises `error` where neither does.

    What was decided elsewhere meanwhile stands.
    """
    alarm, rule = batch.waiting(), run.config.alarm.rule
    if alarm is None:
        assert batch.decisions(), "training writes its alarm before it raises it"
        return
    announce(run, alarm)
    if rule in alarm.actions(run.config.method):
        decide(run, batch, alarm, rule, "rule")
        return
    report(run, alarm, "waits for a decision")
    # On the command line nobody sees a form; there the decision comes with `resume`.
    if not is_deployed():
        raise error
    if ahead is not None:
        ahead.wait()
    try:
        action = ask(run, alarm)
    except FlowPauseTimeout:
        raise error from None
    decide(run, batch, alarm, action, "person")


def decide(run: Run, batch: BatchAlarms, alarm: Alarm, action: Action, decided_by: DecidedBy) -> None:
    """Write down what becomes of the batch unless that was done meanwhile, and tell what holds."""
    try:
        batch.decide(run.config, action, decided_by)
    except ConfigError:
        if batch.waiting() is not None:
            raise
    standing = batch.decisions()[-1]
    how = "by rule" if standing.decided_by == "rule" else "as was decided"
    report(run, alarm, f"{standing.action}, {how}")
