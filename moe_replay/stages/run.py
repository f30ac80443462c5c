"""A run as its stages see it: where its artifacts are, which weights a reference stands for, which seed to use."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.layout import CHECKPOINT_FOLDER, MODEL_FOLDER, PREDICTOR_FILE, RunLayout
from moe_replay.config import RunConfig
from moe_replay.data.prompts import PromptTable
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.seeds import derive_seed
from moe_replay.stages.decisions import is_skipped

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
    model: Path
    """The model that the run starts from, on local disk."""
    model_sha256: str
    train: DataFile
    benchmarks: dict[str, DataFile]

    def store(self) -> RunStore:
        """The run's artifacts."""
        return RunStore(self.root, self.run_id)

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
        return self.store().find(stage, iteration, inputs, self.digest(stage))

    def is_complete(self) -> bool:
        """Whether the last iteration's stages are committed, so that no engine is needed."""
        last, store = self.config.iterations - 1, self.store()
        training = store.committed("training", last)
        needed = ["evaluation"] if self.config.evaluates(last) else []
        needed += ["predictor"] if self.config.method.predictor and training and not is_skipped(training) else []
        return training is not None and all(store.commit_of(stage, last) is not None for stage in needed)

    @property
    def initial_policy(self) -> ArtifactRef:
        """Stands for the model that the run starts from."""
        return ArtifactRef(uri=_INITIAL, sha256=self.model_sha256)

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

        Raises RoutingMismatch unless it is the one that this run fitted in the iteration before.
        """
        if RunLayout.place_of(ref.uri) != (iteration - 1, "predictor"):
            raise RoutingMismatch(
                f"iteration {iteration} is served by the predictor that iteration {iteration - 1} of run {self.run_id} "
                f"fitted, got {ref.uri}; a staler one foretells little, and one of another run nothing: give that one"
            )
        with self.scratch() as folder:
            file = folder / PREDICTOR_FILE
            file.write_bytes(self.open(ref).read_bytes(PREDICTOR_FILE))
            yield file

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on local disk that is gone afterwards."""
        parent = self.home / "scratch"
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)

    def open(self, ref: ArtifactRef) -> Artifact:
        """A committed artifact of this run."""
        return self.store().open(ref)


def as_argument(config: RunConfig, run_id: str) -> str:
    """The run as a command has to name it."""
    return f"{run_id} --root {config.storage.root}" if config.storage.root else run_id
