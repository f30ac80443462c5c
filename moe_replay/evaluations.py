"""Evaluations of their own: which checkpoint, how it is scored, and where that is kept.

An evaluation lies under the root as a run does. It is of one training run (or of a model as it is) under one set of
settings; each checkpoint of that run is scored once, as the `evaluation` stage of the checkpoint's iteration.
"""

import hashlib
import re
import uuid
from typing import Any, NamedTuple

from pydantic import NonNegativeInt, model_validator

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.layout import EVALUATES_KEY
from moe_replay.config import RunConfig
from moe_replay.config_reading import parse_config
from moe_replay.engines.process import Progress
from moe_replay.errors import ConfigError
from moe_replay.holding import require_lease
from moe_replay.places import run_root
from moe_replay.plan import stored_config
from moe_replay.preparation import check_inputs, package_versions, run_with_inputs
from moe_replay.sections import (
    EvaluationConfig,
    ModelConfig,
    RolloutConfig,
    StagesConfig,
    StorageConfig,
    TrackingConfig,
)
from moe_replay.settings import Config
from moe_replay.stages.run import STAGE_SECTIONS, Run

_SUBJECT_LENGTH = 48
"""Letters of the subject in an id made here, so that it stays within the 64 of a run's."""


class EvaluationRequest(Config):
    """What to evaluate, and how where that differs from the training run."""

    run_id: str | None = None
    """A training run; its settings hold where none are given here."""
    iteration: NonNegativeInt | None = None
    """Whose checkpoint of that run; by default the newest trained."""
    model: ModelConfig | None = None
    """A model to evaluate as it is, where no run is named; by default the embedded one."""
    evaluation: EvaluationConfig | None = None
    """Benchmarks, samples and temperature; what is not given is as in the training run."""
    rollout: RolloutConfig | None = None
    """Lengths and precision; what is not given is as in the training run."""
    seed: NonNegativeInt | None = None
    """Root of the sampling seeds; by default the training run's, so that the scores are those of its own evaluation."""
    storage: StorageConfig = StorageConfig()
    """Where the training run lies, and the evaluation beside it."""
    tracking: TrackingConfig | None = None
    """How MLflow files the evaluation; by default with the training run."""
    stages: StagesConfig = StagesConfig()
    """How the evaluation is retried."""

    @model_validator(mode="after")
    def _names_one_subject(self) -> "EvaluationRequest":
        if self.run_id is not None and self.model is not None:
            raise ValueError(f"run_id = {self.run_id!r} and model are two things to evaluate; give one of them")
        if self.run_id is None and self.iteration is not None:
            raise ValueError(f"iteration = {self.iteration} is that of a run's checkpoint; name the run by run_id")
        return self


class Evaluation(NamedTuple):
    """One checkpoint, ready to be evaluated."""

    run: Run
    """The evaluation as its stage sees it."""
    iteration: int
    """Of the checkpoint; 0 for a model as it is."""
    policy: ArtifactRef
    """The checkpoint by its URL, or the model."""
    subject: str
    """The training run's id, or the model's path."""

    @property
    def checkpoint(self) -> str:
        """What is evaluated, as a command names it: RUN@ITERATION, or the model's path."""
        as_it_is = self.policy == self.run.initial_policy
        return self.subject if as_it_is else f"{self.subject}@{self.iteration}"


class _Found(NamedTuple):
    """What a request names."""

    training: RunStore | None
    """The training run; none for a model as it is."""
    config: RunConfig
    subject: str
    store: RunStore
    """The evaluation's own."""
    iteration: int
    checkpoint: ArtifactRef | None


def id_of(request: EvaluationRequest, evaluation_id: str | None) -> str:
    """The evaluation's id: the one that is given, else the one made of the run and the settings.

    Raises ConfigError when there is no such run.
    """
    if evaluation_id:
        return evaluation_id
    _, config, subject = _subject_of(request)
    return default_id(subject, config)


def check_evaluation(request: EvaluationRequest, evaluation_id: str | None) -> str:
    """Raise what `prepare_evaluation` would for a missing checkpoint or an unusable input; starts nothing.

    Returns the evaluation's id.
    """
    return _find(request, evaluation_id).store.run_id


def prepare_evaluation(request: EvaluationRequest, evaluation_id: str | None, progress: Progress) -> Evaluation:
    """Find the checkpoint, bring model and benchmarks to local disk, and create or reopen the evaluation.

    Raises:
        ConfigError: there is no such checkpoint, an input is unusable, or `evaluation_id` exists and is of another
            subject, model, benchmark or setting.
    """
    found = _find(request, evaluation_id)
    run = run_with_inputs(found.config, found.store.run_id, progress)
    if found.training is not None:
        _require_its_model(found.training, run)
    # Model and benchmarks may have taken long to fetch, and another runner have taken over meanwhile.
    require_lease(found.store)
    _create(run, found)
    return Evaluation(run, found.iteration, found.checkpoint or run.initial_policy, found.subject)


def _find(request: EvaluationRequest, evaluation_id: str | None) -> _Found:
    training, config, subject = _subject_of(request)
    iteration, checkpoint = (0, None) if training is None else find_checkpoint(training, request.iteration)
    store = RunStore(run_root(config), evaluation_id or default_id(subject, config))
    check_inputs(config, store)
    return _Found(training, config, subject, store, iteration, checkpoint)


def _subject_of(request: EvaluationRequest) -> tuple[RunStore | None, RunConfig, str]:
    """The training run, if any, the settings and what the evaluation is of; not yet whether there is a checkpoint."""
    root = run_root(RunConfig(storage=request.storage))
    training = None if request.run_id is None else RunStore(root, request.run_id)
    config = settings_of(request, training)
    return training, config, config.model.path if training is None else training.run_id


def settings_of(request: EvaluationRequest, training: RunStore | None) -> RunConfig:
    """The training run's settings with those of the request laid over them."""
    base = RunConfig(model=request.model or ModelConfig()) if training is None else stored_config(training)
    document: dict[str, Any] = base.model_dump() | {"storage": request.storage, "stages": request.stages}
    for section in ("rollout", "evaluation", "tracking"):
        if given := getattr(request, section):
            document[section] |= given.model_dump(exclude_unset=True)
    if request.seed is not None:
        document["seed"] = request.seed
    # The run's own counts of samples, where the request names other benchmarks.
    asked = request.evaluation.samples_of if request.evaluation else {}
    evaluation = document["evaluation"]
    counted = evaluation["samples_of"].items()
    evaluation["samples_of"] = {name: n for name, n in counted if name in evaluation["benchmarks"] or name in asked}
    if not document["evaluation"]["benchmarks"]:
        raise ConfigError("evaluation.benchmarks is empty, so there is nothing to score; name one")
    # Nothing is trained, so the training problems need not be on this machine: a benchmark stands in their place.
    document["data"] = {"train": next(iter(document["evaluation"]["benchmarks"].values()))}
    return parse_config(document)


def default_id(subject: str, config: RunConfig) -> str:
    """The id of the evaluation of this subject under these settings: the same each time they are asked for."""
    digest = hashlib.sha256(f"{subject}\0{config.digest(*STAGE_SECTIONS['evaluation'])}".encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", subject.rstrip("/").rpartition("/")[2])
    return f"eval-{name[:_SUBJECT_LENGTH]}-{digest[:8]}"


def find_checkpoint(training: RunStore, iteration: int | None) -> tuple[int, ArtifactRef]:
    """Iteration and URL of a run's checkpoint, by default of the newest. Raises ConfigError when there is none."""
    candidates = reversed(training.iterations()) if iteration is None else [iteration]
    for number in candidates:
        if ref := training.commit_of("training", number):
            return number, ArtifactRef(uri=(training.folder / ref.uri).name, sha256=ref.sha256)
    which = "no checkpoint yet" if iteration is None else f"no checkpoint of iteration {iteration}"
    raise ConfigError(
        f"run {training.run_id} has {which}; see what is committed with moe-replay status {training.run_id}"
    )


def _require_its_model(training: RunStore, run: Run) -> None:
    """The engine starts from the model that the run started from; another one's checkpoint may not fit it."""
    expected = training.read_run().get("model_sha256")
    if run.model_sha256 != expected:
        raise ConfigError(
            f"the model {run.config.model.path} has sha256 {run.model_sha256}, run {training.run_id} was started from "
            f"{expected}; put back the one it was started from"
        )


def _create(run: Run, found: _Found) -> None:
    """Write `run.json`, or check that the one that is there is of the same subject, settings and inputs."""
    about = {} if found.training is None else found.training.read_run().get("about", {})
    identity = {
        "run_id": run.run_id,
        "config": run.config.model_dump(mode="json", include=set(STAGE_SECTIONS["evaluation"])),
        # A run of the same name that was deleted and made again is another one.
        EVALUATES_KEY: {"subject": found.subject, "created_as": about.get("created_as", "")},
        "model_sha256": run.model_sha256,
        "benchmarks_sha256": {name: file.sha256 for name, file in run.benchmarks.items()},
    }
    found.store.create_run(identity, about={"versions": package_versions(), "created_as": uuid.uuid4().hex})
