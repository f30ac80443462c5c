"""What a run has to do, as `run.json` tells: where it starts, and which stages each iteration has.

Settings that were changed on the way are kept with the run, so that what was made under earlier ones stays of use.
"""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.layout import ABOUT_KEY, EVALUATES_KEY, FORK_KEY, IMPORTS_KEY, STAGES
from moe_replay.config import RunConfig
from moe_replay.config_reading import parse_config
from moe_replay.errors import ArchiveCorrupt, ConfigError

CHANGES_KEY = "config_changes"
"""Key under `about` in `run.json`."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConfigChange(_Record):
    """One change of a run's settings while it went on."""

    on: datetime
    since: int = Field(ge=0)
    """The first iteration that was not complete then: the new settings hold from it on."""
    keys: tuple[str, ...]
    """What was changed, dotted."""
    before: dict[str, Any]
    """The old values of the config's top-level keys in which that lies: `iterations`, `evaluation` whole."""
    benchmarks_sha256: dict[str, str]
    """Checksums of the benchmarks before."""


class EarlierConfig(_Record):
    """Settings that a run had before they were changed."""

    config: RunConfig
    until: int
    """The first iteration for which they hold no more."""


class ForkPoint(_Record):
    """Where a run goes on from another's committed artifacts, which stay where they are."""

    root: str
    """URL under which the other run lies."""
    run_id: str
    """The other run."""
    iteration: int = Field(ge=1)
    """The first that the new run makes itself."""
    model_sha256: str
    """Of the model that both start from."""
    policy: ArtifactRef
    """The other's training of the iteration before."""
    predictor: ArtifactRef | None
    """The other's predictor of the iteration before, where both methods fit one."""
    carried: ArtifactRef | None = None
    """The other's rollout of the iteration before, where both go on with what it left unfinished."""
    trainings: tuple[ArtifactRef, ...]
    """Of the other and of those that it was forked from, newest first, as many as a predictor is fitted from."""
    lineage: tuple[str, ...]
    """The runs that these trainings may be of."""

    @classmethod
    def stored(cls, store: RunStore) -> "ForkPoint | None":
        """Where a run that exists was forked; None where it starts from the model. Raises as `RunStore.read_run`."""
        return _forked_from(store, store.read_run())


class RunPlan(_Record):
    """Which iterations a run has, and which stages each of them."""

    config: RunConfig
    """As it is now."""
    earlier: tuple[EarlierConfig, ...] = ()
    """Oldest first."""
    forked_from: ForkPoint | None = None

    @classmethod
    def stored(cls, store: RunStore) -> "RunPlan":
        """The plan of a run that exists.

        Raises ConfigError when it does not or holds imported routes or an evaluation, ArchiveCorrupt when `run.json` is
        damaged.
        """
        return cls.of(store, store.read_run())

    @classmethod
    def of(cls, store: RunStore, document: dict[str, Any]) -> "RunPlan":
        """The plan of a run whose `run.json` was read; raises as `stored`."""
        if IMPORTS_KEY in document:
            raise ConfigError(
                f"run {store.run_id} holds routes that were imported, nothing to train; see moe-replay archive "
                f"inspect {store.run_id}"
            )
        if evaluates := document.get(EVALUATES_KEY):
            raise ConfigError(
                f"{store.run_id} is an evaluation of {evaluates.get('subject')}, nothing to train; it goes on with "
                "moe-replay evaluate"
            )
        settings = document.get("config")
        if not isinstance(settings, dict):
            raise ArchiveCorrupt(f"run.json of {store.name} holds no config; restore it or start a new run")
        return cls(
            config=parse_config(settings),
            earlier=_earlier(store, document, settings),
            forked_from=_forked_from(store, document),
        )

    @property
    def iterations(self) -> range:
        """All iterations that the run has in the end; a fork has none before the one it was forked at."""
        return range(self.forked_from.iteration if self.forked_from else 0, self.config.iterations)

    def rolls_out_beside(self, iteration: int) -> bool:
        """Whether the next iteration's batch is sampled while this one is trained on."""
        return self.config.rollout.one_step_off and iteration + 1 in self.iterations

    def evaluates(self, iteration: int) -> bool:
        """Whether the policy is scored after an iteration.

        By the settings that were in force when it was completed, so that a change asks for no evaluation of the past;
        and after what is now the last.
        """
        in_force = next((before.config for before in self.earlier if iteration < before.until), self.config)
        is_last = iteration == self.config.iterations - 1
        return in_force.evaluates(iteration) or (is_last and self.config.evaluates(iteration))

    def stages(self, iteration: int) -> list[str]:
        """The stages of an iteration, in order."""
        left_out = set() if self.config.method.predictor else {"predictor"}
        left_out |= set() if self.evaluates(iteration) else {"evaluation"}
        return [stage for stage in STAGES if stage not in left_out]


def stored_config(store: RunStore) -> RunConfig:
    """The config that a run has now; raises as `RunPlan.stored`."""
    return RunPlan.stored(store).config


def _earlier(store: RunStore, document: dict[str, Any], settings: dict[str, Any]) -> tuple[EarlierConfig, ...]:
    """What the config was before each change, from the newest change back."""
    found: list[EarlierConfig] = []
    try:
        changes = [ConfigChange.model_validate(one) for one in document.get(ABOUT_KEY, {}).get(CHANGES_KEY, [])]
        for change in reversed(changes):
            settings = {**settings, **change.before}
            # Where a later change began earlier, all from there on was made again under it.
            until = min([change.since, *(one.until for one in found[:1])])
            found.insert(0, EarlierConfig(config=parse_config(settings), until=until))
    except (ValidationError, AttributeError, TypeError) as error:
        raise ArchiveCorrupt(
            f"run.json of {store.name} says nothing readable of how the config was changed ({type(error).__name__}); "
            "restore it or start a new run"
        ) from error
    return tuple(found)


def _forked_from(store: RunStore, document: dict[str, Any]) -> ForkPoint | None:
    if FORK_KEY not in document:
        return None
    try:
        return ForkPoint.model_validate(document[FORK_KEY])
    except ValidationError as error:
        raise ArchiveCorrupt(
            f"run.json of {store.name} says nothing readable of what the run was forked from; restore it"
        ) from error
