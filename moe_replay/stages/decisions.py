"""Alarms of a run and what was decided on them: small objects beside an iteration's stages, each written once.

Training writes an alarm when it stops before a batch; a rule or a person writes the decision; training finds it, at
once and whenever it is resumed. Both are of one rollout: another batch in its place raises an alarm of its own. The
second alarm of a batch is the one that it raises under the rollout's routes, after falling back to them.
"""

from typing import Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_replay.alarm import ALARM_METRIC, Action, Excess, actions_for
from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import ArtifactRef, JsonScalar, canonical_json
from moe_replay.config import RunConfig
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.methods import Method

DecidedBy = Literal["rule", "person"]
_DECISIONS = "alarm_decisions"
"""Attribute of a training's commit; absent where no alarm was raised."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_ARecord = TypeVar("_ARecord", bound=_Record)


class Alarm(_Record):
    """Why a batch was not trained on."""

    iteration: int
    metric: str
    value: float
    bound: float
    fallen_back: bool
    """Whether the mismatch is that under the rollout's routes, which the method does not replay by itself."""

    def actions(self, method: Method) -> tuple[Action, ...]:
        """What can be decided."""
        return actions_for(method, self.fallen_back)

    @property
    def reason(self) -> str:
        """In words."""
        routes = " under the rollout's routes" if self.fallen_back else ""
        return f"{self.metric} = {self.value:.4g}{routes} is beyond the bound of {self.bound:g}"


class Decision(_Record):
    """What becomes of a batch."""

    alarm: Alarm
    action: Action
    lr_factor: float | None
    """What the learning rate is multiplied by, where that is the action."""
    decided_by: DecidedBy


class BatchAlarms(NamedTuple):
    """The alarms of one iteration's batch, as stored, and the decisions on them."""

    store: RunStore
    iteration: int
    rollout: ArtifactRef

    def decisions(self) -> tuple[Decision, ...]:
        """What was decided, in order; raises ArchiveCorrupt for an object that is no decision."""
        found: list[Decision] = []
        while not found or found[-1].action == "fall_back":
            decision = self._read(Decision, self._path("decision", len(found) + 1))
            if decision is None:
                break
            found.append(decision)
        return tuple(found)

    def waiting(self) -> Alarm | None:
        """The alarm that nothing was decided on yet; raises ArchiveCorrupt for an object that is no alarm."""
        return self._read(Alarm, self._path("alarm", len(self.decisions()) + 1))

    def raise_alarm(self, excess: Excess) -> Alarm:
        """Write down that the batch is beyond a bound."""
        decided = self.decisions()
        alarm = Alarm(iteration=self.iteration, fallen_back=bool(decided), **excess._asdict())
        # What a batch is measured at may differ in its last digits from attempt to attempt: the newest stands.
        self.store.folder.write(self._path("alarm", len(decided) + 1), canonical_json(alarm.model_dump(mode="json")))
        return alarm

    def decide(self, config: RunConfig, action: Action, decided_by: DecidedBy) -> Decision:
        """Write down what becomes of the batch, for good.

        Raises ConfigError when nothing waits for a decision, this one can't be taken, or another was meanwhile.
        """
        number = len(self.decisions()) + 1
        alarm = self._read(Alarm, self._path("alarm", number))
        if alarm is None:
            raise ConfigError(
                f"iteration {self.iteration} of run {self.store.run_id} waits for no decision; see moe-replay status "
                f"{self.store.run_id}"
            )
        possible = alarm.actions(config.method)
        if action not in possible:
            raise ConfigError(
                f"iteration {self.iteration} of run {self.store.run_id} is trained under the routes of the rollout "
                f"already, there is nothing to {action} to; decide for one of {', '.join(possible)}"
            )
        lr_factor = config.alarm.lr_factor if action == "lower_lr" else None
        decision = Decision(alarm=alarm, action=action, lr_factor=lr_factor, decided_by=decided_by)
        try:
            self.store.folder.create(self._path("decision", number), canonical_json(decision.model_dump(mode="json")))
        except FileExistsError as error:
            standing = self.decisions()[-1]
            if standing != decision:
                raise ConfigError(
                    f"iteration {self.iteration} of run {self.store.run_id} was decided on meanwhile: {standing.action}"
                ) from error
        return decision

    def _path(self, what: Literal["alarm", "decision"], number: int) -> str:
        return self.store.layout.alarm_file(self.iteration, what, self.rollout.sha256, number)

    def _read(self, record: type[_ARecord], path: str) -> _ARecord | None:
        try:
            data = self.store.folder.read(path)
        except FileNotFoundError:
            return None
        try:
            return record.model_validate_json(data)
        except ValidationError as error:
            raise ArchiveCorrupt(
                f"object {self.store.name}/{path} is no {record.__name__.lower()} ({error.error_count()} problems); "
                "remove it and resume the run to decide again"
            ) from error


def waiting_batch(store: RunStore) -> BatchAlarms | None:
    """The batch of a run that waits for a decision; at most one does, since no training goes on without it."""
    for iteration in reversed(store.iterations()):
        if store.commit_of("training", iteration) is not None:
            break
        # A rollout that is one step off may be there before the batch before it is decided on.
        rollout = store.commit_of("rollout", iteration)
        if rollout is not None and (batch := BatchAlarms(store, iteration, rollout)).waiting() is not None:
            return batch
    return None


class Decided(NamedTuple):
    """How a batch is trained on, all decisions taken together."""

    config: RunConfig
    """The run's, whose method replays the rollout's routes where it falls back to them."""
    decisions: tuple[Decision, ...]

    @classmethod
    def of(cls, config: RunConfig, decisions: tuple[Decision, ...]) -> "Decided":
        """What the decisions on a batch, in order, make of it."""
        if any(decision.action == "fall_back" for decision in decisions):
            method = config.method.model_copy(update={"route_source": "rollout", "predictor": False})
            config = config.model_copy(update={"method": method})
        return cls(config, decisions)

    @property
    def is_final(self) -> bool:
        """Whether the batch is not watched any more."""
        return bool(self.decisions) and self.decisions[-1].action != "fall_back"

    @property
    def skips(self) -> bool:
        """Whether the batch is left out."""
        return any(decision.action == "skip" for decision in self.decisions)

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied by."""
        return next((decision.lr_factor for decision in self.decisions if decision.lr_factor is not None), 1.0)

    def metrics(self) -> dict[str, float]:
        """How many alarms were raised; absent without one, so that the commit is that of a run that has no bounds."""
        return {ALARM_METRIC: float(len(self.decisions))} if self.decisions else {}

    def attributes(self) -> dict[str, JsonScalar | list[JsonScalar]]:
        """What the training's commit says; nothing without an alarm, and not who decided: that changes no weight."""
        if not self.decisions:
            return {}
        factor = {"alarm_lr_factor": self.lr_factor} if self.lr_factor != 1.0 else {}
        return {_DECISIONS: [decision.action for decision in self.decisions], **factor}


def actions_in(training: Artifact) -> list[str]:
    """What was decided on the batch of a committed training; empty without an alarm."""
    actions = training.commit.attributes.get(_DECISIONS, [])
    return [str(action) for action in actions] if isinstance(actions, list) else []


def is_skipped(training: Artifact) -> bool:
    """Whether the training left its batch out, so that its policy is the one before and it has no evolution."""
    return "skip" in actions_in(training)
