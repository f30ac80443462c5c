"""Where everything of a run lives: `<root>/<run_id>/run.json` and `iterations/00003/<stage>/...`.

Paths here are relative to the run's folder, with forward slashes, whatever the storage behind it.
"""

import re
from dataclasses import dataclass

from moe_replay.errors import ConfigError

STAGES = ("rollout", "routes", "training", "predictor", "evaluation")
"""The stages of one iteration, in the order in which they run."""

RUN_FILE = "run.json"
ABOUT_KEY = "about"
"""Key in `run.json` of what may change while the run goes on, and what is told of it for people."""
IMPORTS_KEY = "imported_routes"
"""Key in `run.json` of a run that holds imported routes and is never trained."""
EVALUATES_KEY = "evaluates"
"""Key in `run.json` of an evaluation, which trains nothing: which run's checkpoints, or which model, it is of."""
FORK_KEY = "forked_from"
"""Key in `run.json` of a run that goes on from another's artifacts: which, and where they are."""
COMMIT_FILE = "_committed.json"
TIMING_FILE = "_timing.json"
ATTEMPT_FILE = "_attempt.json"
SUPERSEDED_FILE = "_superseded.json"
RESERVED_FILES = frozenset({COMMIT_FILE, TIMING_FILE, ATTEMPT_FILE, SUPERSEDED_FILE})
"""Names in a stage's folder that are the archive's own and never an object of the stage."""
CHECKPOINT_FOLDER = "checkpoint"
"""Folder of the checkpoint within a training artifact."""
MODEL_FOLDER = "huggingface"
"""Folder of the Hugging Face model within a checkpoint."""
PREDICTOR_FILE = "predictor.safetensors"
"""The predictor to use, within a predictor artifact."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ITERATION = re.compile(r"[0-9]{5,}")
_ATTEMPT = re.compile(rf"_attempt-({'|'.join(STAGES)})-[0-9a-f]{{32}}")
_SUPERSEDED = re.compile(rf"_superseded-({'|'.join(STAGES)})-[0-9a-f]{{64}}")
_ON_ALARM = re.compile(r"_(?:alarm|decision)-([0-9a-f]{64})-[0-9]+\.json")
_PLACEMENT = re.compile(r"_objects-[0-9a-f]{64}\.json")


def check_run_id(run_id: str) -> str:
    """Return `run_id`; raise ConfigError unless it is one plain name that can't leave the root."""
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"run id {run_id[:80]!r} is not usable: it must be 1 to 64 letters, digits, '.', '_' or '-' and start "
            "with a letter or digit; it is a name under the root, never a path"
        )
    return run_id


def check_object_path(path: str) -> str:
    """Return `path`; raise ValueError unless it names an object strictly inside a stage's folder.

    Object paths are read from storage, so nothing in them is trusted.
    """
    parts = path.split("/")
    if "\\" in path or any(part in ("", ".", "..") for part in parts) or not path.isprintable() or ":" in parts[0]:
        raise ValueError(f"object path {path[:200]!r} is not a relative path inside the artifact's folder")
    if path in RESERVED_FILES or _PLACEMENT.fullmatch(path):
        raise ValueError(f"object path {path!r} is reserved for the archive itself")
    return path


def attempt_folder(stage: str, attempt: str) -> str:
    """Name, beside the stage's folder, of the folder that one attempt (32 hexadecimal digits) writes to."""
    return f"_attempt-{stage}-{attempt}"


def attempted_stage(folder: str) -> str | None:
    """The stage that an attempt's folder name is of, or None when it is not one."""
    match = _ATTEMPT.fullmatch(folder)
    return match and match[1]


def superseded_folder(stage: str, sha256: str) -> str:
    """Name, beside the stage's folder, of the folder that keeps the commit `sha256` after it was superseded."""
    return f"_superseded-{stage}-{sha256}"


def superseded_stage(folder: str) -> str | None:
    """The stage that a folder of something superseded is of, or None when it is not one."""
    match = _SUPERSEDED.fullmatch(folder)
    return match and match[1]


def stage_of(folder: str) -> str | None:
    """The stage that a folder of an iteration belongs to: its own, an attempt's, or that of something superseded."""
    return folder if folder in STAGES else attempted_stage(folder) or superseded_stage(folder)


def alarmed_rollout(file: str) -> str | None:
    """The commit of the rollout that a file of an iteration is an alarm or a decision on, or None when it is neither.

    See `RunLayout.alarm_file`.
    """
    match = _ON_ALARM.fullmatch(file)
    return match and match[1]


def placement_file(sha256: str) -> str:
    """Name, in the stage's folder, of the object that says where the objects of commit `sha256` lie."""
    return f"_objects-{sha256}.json"


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run, relative to its folder `run_id` under the root."""

    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    def stage(self, iteration: int, stage: str) -> str:
        """Folder of one stage, e.g. `iterations/00003/rollout`; the uri of its artifact.

        Raises ConfigError for a stage that does not exist and for a negative iteration.
        """
        if stage not in STAGES:
            raise ConfigError(f"no stage is named {stage!r}; the stages are {', '.join(STAGES)}")
        if iteration < 0:
            raise ConfigError(f"iteration {iteration} is negative; iterations count from 0")
        return f"iterations/{iteration:05d}/{stage}"

    def alarm_file(self, iteration: int, what: str, rollout_sha256: str, number: int) -> str:
        """A stability `alarm` on the batch in this commit of a rollout, or the `decision` on it; counted from 1."""
        return f"iterations/{iteration:05d}/_{what}-{rollout_sha256}-{number}.json"

    @staticmethod
    def iteration_of(folder: str) -> int | None:
        """Iteration that a folder name under `iterations/` stands for, or None for foreign names."""
        return int(folder) if _ITERATION.fullmatch(folder) and folder == f"{int(folder):05d}" else None

    @staticmethod
    def place_of(uri: str) -> tuple[int, str] | None:
        """(iteration, stage) of a stage's folder `uri`, or None when it is not one."""
        parts = uri.split("/")
        if len(parts) != 3 or parts[0] != "iterations" or parts[2] not in STAGES:
            return None
        iteration = RunLayout.iteration_of(parts[1])
        return None if iteration is None else (iteration, parts[2])
