"""A run as its stages see it: where its artifacts are, which weights a reference stands for, which seed to use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.dependents import needed_starts
from moe_replay.archive.layout import CHECKPOINT_FOLDER, MODEL_FOLDER, PREDICTOR_FILE, RunLayout
from moe_replay.config import RunConfig
from moe_replay.data.prompts import PromptTable
from moe_replay.errors import ArchiveCorrupt, ConfigError, RoutingMismatch
from moe_replay.plan import EarlierConfig, ForkPoint, RunPlan
from moe_replay.seeds import derive_seed
from moe_replay.stages.completion import missing_stages
from moe_replay.stages.scratch import scratch_folder

_INITIAL = "model://initial"

STAGE_SECTIONS = {
    "rollout": ("seed", "model", "data", "rollout"),
    "routes": ("storage",),
    "training": ("seed", "model", "method", "rollout", "training", "evolution"),
    "predictor": ("predictor",),
    "evaluation": ("seed", "model", "rollout", "evaluation"),
}
"""The sections of the config that a stage's output depends on, besides its inputs."""


class Policy(NamedTuple):
    """Weights on local disk."""

    folder: Path
    """A Hugging Face model, or a checkpoint of the training engine."""
    sha256: str
    is_checkpoint: bool

    @property
    def model_folder(self) -> Path:
        """Where the Hugging Face model lies, which both engines load."""
        return self.folder / MODEL_FOLDER if self.is_checkpoint else self.folder


class DataFile(BaseModel):
    """A Parquet file of prompts, as it was when the run was prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    sha256: str

    def open(self) -> PromptTable:
        """The prompts; raises ConfigError when the file has changed since."""
        table = PromptTable.open(self.path)
        if table.digest != self.sha256:
            raise ConfigError(
                f"{self.path} has sha256 {table.digest}, the run was prepared with {self.sha256}; "
                "put the file back, or start a new run with the new one"
            )
        return table


class Run(BaseModel):
    """One run, prepared: everything a stage needs, small enough to be a parameter of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    root: str
    """URL under which the run's folder lies."""
    home: Path
    """Local folder for logs and scratch files."""
    config: RunConfig
    earlier: tuple[EarlierConfig, ...] = ()
    """Settings that the run had before they were changed, oldest first."""
    forked_from: ForkPoint | None = None
    """What the run goes on from, where that is not the model."""
    model: Path
    """The model that the run starts from, on local disk."""
    model_sha256: str
    train: DataFile
    benchmarks: dict[str, DataFile]

    def store(self) -> RunStore:
        """The run's artifacts."""
        return RunStore(self.root, self.run_id)

    @property
    def plan(self) -> RunPlan:
        """Which iterations and stages the run has."""
        return RunPlan(config=self.config, earlier=self.earlier, forked_from=self.forked_from)

    def seed(self, *what: str | int) -> int:
        """The seed for one purpose (see `derive_seed`)."""
        return derive_seed(self.config.seed, *what)

    def digest(self, stage: str) -> str:
        """What a stage's output depends on in the config."""
        return self.config.digest(*STAGE_SECTIONS[stage])

    def find(self, stage: str, iteration: int, inputs: dict[str, ArtifactRef]) -> ArtifactRef | None:
        """The stage's commit made from these inputs and this config, verified; none when it is still to be made.

        Raises ConfigError when the stage was committed from others.
        """
        earlier = {before.config.digest(*STAGE_SECTIONS[stage]) for before in self.earlier}
        return self.store().find(stage, iteration, inputs, self.digest(stage), earlier)

    def is_complete(self) -> bool:
        """Whether the last iteration's stages are committed, so that no engine is needed."""
        return not missing_stages(self.store(), self.plan, self.config.iterations - 1)

    @property
    def initial_policy(self) -> ArtifactRef:
        """Stands for the model that the run starts from."""
        return ArtifactRef(uri=_INITIAL, sha256=self.model_sha256)

    def weight_version(self, policy: ArtifactRef) -> int:
        """The iteration that trains these weights: 0 for the model, n + 1 for what iteration n made of them."""
        fork = self.forked_from
        if fork is not None and policy == fork.policy:
            return fork.iteration
        place = RunLayout.place_of(policy.uri)
        return place[0] + 1 if place else 0

    @contextmanager
    def policy(self, ref: ArtifactRef, with_optimizer: bool) -> Iterator[Policy]:
        """The weights a reference stands for, on local disk and verified, for as long as they are being loaded."""
        if ref.uri == _INITIAL:
            yield Policy(self.model, ref.sha256, is_checkpoint=False)
            return
        below = CHECKPOINT_FOLDER if with_optimizer else f"{CHECKPOINT_FOLDER}/{MODEL_FOLDER}"
        with self.scratch() as folder:
            local = self.open(ref).localize(folder, below)
            yield Policy(local / CHECKPOINT_FOLDER, ref.sha256, is_checkpoint=True)

    @contextmanager
    def predictor(self, ref: ArtifactRef, iteration: int) -> Iterator[Path]:
        """The predictor to serve an iteration with, a verified file on local disk for as long as it is being read.

        Raises RoutingMismatch unless it is the one that this run, or the one it was forked from, fitted in the
        iteration before.
        """
        fork = self.forked_from
        is_of_fork = fork is not None and (fork.iteration, fork.predictor) == (iteration, ref)
        if not is_of_fork and RunLayout.place_of(ref.uri) != (iteration - 1, "predictor"):
            raise RoutingMismatch(
                f"iteration {iteration} is served by the predictor that iteration {iteration - 1} of run {self.run_id} "
                f"fitted, got {ref.uri}; a staler one foretells little, and one of another run nothing: give that one"
            )
        with self.scratch() as folder:
            file = folder / PREDICTOR_FILE
            file.write_bytes(self.open(ref).read_bytes(PREDICTOR_FILE))
            yield file

    def carried(self, ref: ArtifactRef | None, iteration: int) -> Artifact | None:
        """The rollout whose unfinished responses an iteration goes on with; none for the first iteration.

        Raises ConfigError unless it is that of the iteration before, of this run or the one it was forked from.
        """
        fork = self.forked_from
        if fork is not None and fork.iteration == iteration:
            expected = ref == fork.carried
        elif ref is None:
            expected = iteration == 0
        else:
            expected = RunLayout.place_of(ref.uri) == (iteration - 1, "rollout")
        if not expected:
            raise ConfigError(
                f"iteration {iteration} of run {self.run_id} goes on with what the rollout before left unfinished, got "
                f"{ref.uri if ref else 'none'}; prompts would be lost or trained on twice: give that one"
            )
        return self.open(ref) if ref else None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on local disk that is gone afterwards; raises StorageFull when no room is left there."""
        with scratch_folder(self.home / "scratch") as folder:
            yield folder

    def open(self, ref: ArtifactRef) -> Artifact:
        """A committed artifact of this run, or of one it was forked from."""
        return self.store().open(ref)

    def require_origin(self) -> None:
        """Raise ConfigError when the run still needs what it was forked from, and that is not there any more."""
        fork = self.forked_from
        if fork is None:
            return
        needed = needed_starts(self.store(), fork.iteration, self.plan.rolls_out_beside(fork.iteration))
        for ref in filter(None, (getattr(fork, name) for name in needed)):
            try:
                found = self.open(ref)
                found.require_present()
                problem = found.expiry and f"{found.name} lost objects to retention ({found.expiry.why})"
            except ArchiveCorrupt as error:
                problem = str(error)
            if problem:
                raise ConfigError(
                    f"run {self.run_id} was forked from iteration {fork.iteration} of run {fork.run_id} under "
                    f"{fork.root}, and what it starts from is not there: {problem}"
                )
