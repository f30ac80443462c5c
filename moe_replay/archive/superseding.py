"""Taking back what is committed: an artifact and all that was made from it make room, and are kept until they are gone.

What is superseded lies beside the stage's folder, in `_superseded-<stage>-<sha256 of the commit>`. On a local disk that
is the stage's folder, renamed; elsewhere it holds the commit, a note of where its objects lie, and when that was, and
then the commit is removed from its place. With a rollout or a training go the stability alarms on the batch and the
decisions, so that they are taken anew, and with a training those on the batch after it. `archive gc` removes all of it
after a while.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import canonical_json
from moe_replay.archive.layout import (
    ABOUT_KEY,
    COMMIT_FILE,
    STAGES,
    SUPERSEDED_FILE,
    TIMING_FILE,
    alarmed_rollout,
    placement_file,
    superseded_folder,
    superseded_stage,
)
from moe_replay.archive.storage import Storage, storage_errors
from moe_replay.errors import ArchiveCorrupt, ConfigError

SUPERSEDED_KEY = "superseded"
"""Key under `about` in `run.json` of what was taken back, a list of records."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Note(_Record):
    on: datetime


def made_from(store: RunStore, stage: str, iteration: int) -> list[Artifact]:
    """What a stage committed and everything that was made from it, directly or not, what was made last first.

    Empty when the stage is not committed. Raises ArchiveCorrupt for a commit that can't be read.
    """
    first = store.committed(stage, iteration)
    if first is None:
        return []
    found = {first.ref.uri: first}
    for later in [n for n in store.iterations() if n >= iteration]:
        for name in STAGES:
            artifact = store.committed(name, later)
            if artifact and any(ref.uri in found for ref in artifact.commit.inputs.values()):
                found[artifact.ref.uri] = artifact
    return list(found.values())[::-1]


def require_remakeable(store: RunStore, artifacts: Sequence[Artifact]) -> None:
    """Refuse to take back what could not be made again, for what it was made from is not there.

    Raises ConfigError when retention removed an input that is not among the artifacts, ArchiveCorrupt when one is lost.
    """
    made_again = {artifact.ref.uri for artifact in artifacts}
    for artifact in artifacts:
        for name, ref in artifact.commit.inputs.items():
            # A predictor is fitted without the earlier trainings and the predictor that retention removed.
            is_dispensable = artifact.commit.stage == "predictor" and name != "training"
            if ref.uri in made_again or is_dispensable or not ref.is_stored:
                continue
            needed = store.open(ref)
            if needed.expiry is not None:
                raise ConfigError(
                    f"{artifact.name} could not be made again: objects of its {name}, {needed.name}, were removed by "
                    f"retention on {needed.expiry.on:%Y-%m-%d} ({needed.expiry.why}); nothing was superseded: take a "
                    "later iteration, or start a new run"
                )
            needed.require_present()


def supersede(store: RunStore, artifacts: Sequence[Artifact]) -> None:
    """Take back what `made_from` found, one after the other: cut short, a repetition of both finishes it.

    Before the first is touched, `run.json` tells of it, and counts one more generation (`generation_of`).
    """
    now, first = datetime.now(UTC).replace(microsecond=0), artifacts[-1].commit
    document = store.read_run()
    about = document.get(ABOUT_KEY, {})
    record = {"on": now.isoformat(), "stage": first.stage, "iteration": first.iteration, "commits": len(artifacts)}
    records = [*about.get(SUPERSEDED_KEY, []), record]
    store.rewrite_run({**document, ABOUT_KEY: {**about, SUPERSEDED_KEY: records}})
    for artifact in artifacts:
        _set_aside(store, artifact, _Note(on=now))


def generation_of(store: RunStore) -> int:
    """How often something of the run was superseded: what is told elsewhere of an earlier generation is of the past."""
    return generation_in(store.read_run())


def generation_in(document: Mapping[str, Any]) -> int:
    """As `generation_of`, of a `run.json` that was read."""
    return len(document.get(ABOUT_KEY, {}).get(SUPERSEDED_KEY, []))


def superseded_folders(store: RunStore, iteration: int, stage: str | None = None) -> list[str]:
    """Folders, relative to the run, that keep what was superseded of an iteration, or of one of its stages."""
    folder = f"iterations/{iteration:05d}"
    found = [(name, superseded_stage(name)) for name in (store.folder / folder).folders()]
    return [f"{folder}/{name}" for name, of in found if of is not None and stage in (None, of)]


def superseded_artifact(store: RunStore, folder: str) -> Artifact | None:
    """What such a folder keeps; None when it is not whole, as a removal that was cut short leaves it."""
    try:
        return Artifact.found(store.folder / folder, folder)
    except (FileNotFoundError, ArchiveCorrupt):
        return None


def superseded_on(store: RunStore, folder: str) -> datetime | None:
    """When it was superseded; None where that is not told any more."""
    try:
        return _Note.model_validate_json((store.folder / folder).read(SUPERSEDED_FILE)).on
    except (FileNotFoundError, ValidationError):
        return None


def _set_aside(store: RunStore, artifact: Artifact, note: _Note) -> None:
    stage, commit = store.folder / artifact.ref.uri, artifact.commit
    aside = stage.beside(superseded_folder(commit.stage, artifact.ref.sha256))
    told = canonical_json(note.model_dump(mode="json"))
    folder, place = stage.local_folder, aside.local_folder
    if folder is not None and place is not None:
        stage.write(SUPERSEDED_FILE, told)
        _set_alarms_aside(store, artifact, stage)
        # The very same artifact may have been superseded before, and made again.
        aside.remove_all()
        with storage_errors(f"superseding {stage.name}", creating=True):
            os.rename(folder, place)
        return
    # Where it says nothing else, the objects lie in the stage's folder, which is no more that of this commit.
    placement = artifact.placement.model_copy(update={"folder": artifact.placement.folder or commit.stage})
    placement.write(aside, artifact.ref.sha256)
    aside.write(SUPERSEDED_FILE, told)
    _set_alarms_aside(store, artifact, aside)
    with suppress(FileNotFoundError):
        aside.write(TIMING_FILE, stage.read(TIMING_FILE))
    aside.write(COMMIT_FILE, commit.to_bytes())
    for name in (COMMIT_FILE, TIMING_FILE, placement_file(artifact.ref.sha256)):
        stage.remove(name)


def _set_alarms_aside(store: RunStore, artifact: Artifact, aside: Storage) -> None:
    """Move the alarms on the artifact's batch, and the decisions, to where the artifact goes.

    To be called before that, so that a superseding that was cut short is known by the commit that is there still.
    """
    commit = artifact.commit
    rollout = artifact.ref if commit.stage == "rollout" else commit.inputs.get("rollout")
    if commit.stage not in ("rollout", "training") or rollout is None:
        return
    batches = {commit.iteration: rollout}
    # The next batch stays where its rollout was one step off, but what it was measured at was this training's policy.
    following = store.commit_of("rollout", commit.iteration + 1) if commit.stage == "training" else None
    batches |= {commit.iteration + 1: following} if following else {}
    for n, alarmed in batches.items():
        iteration = store.folder / f"iterations/{n:05d}"
        for name in iteration.files(deep=False):
            if alarmed_rollout(name) == alarmed.sha256:
                aside.write(name, iteration.read(name))
                iteration.remove(name)
