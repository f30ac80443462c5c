"""What may be removed from a run's storage, and why: leftovers, what was superseded, and artifacts that have served.

Removing an artifact takes its objects and never its commit: what was made from it refers to the commit, whose metrics
stay too. That they are gone is written down first (`placement`), so that a cleaning cut short looks like no damage.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import Commit
from moe_replay.archive.layout import CHECKPOINT_FOLDER, COMMIT_FILE, IMPORTS_KEY, STAGES, RunLayout, superseded_stage
from moe_replay.archive.leftovers import GRACE, claims_in, dead_claims, leftovers_of, unreferenced
from moe_replay.archive.placement import Expiry
from moe_replay.archive.removal import Files, Findings, Removable, files_of, path_of
from moe_replay.archive.superseding import superseded_artifact, superseded_on
from moe_replay.errors import ArchiveCorrupt, ConfigError

EXPIRING_STAGES = tuple(stage for stage in STAGES if stage != "evaluation")
"""Stages whose objects retention may remove; an evaluation's scores are small, and what a run was made for."""


@dataclass(frozen=True)
class Retention:
    """Which artifacts a user no longer wants; by default all are kept.

    Whatever is asked, the newest iteration whose training is committed and all after it keep everything, since the run
    goes on from there; and the one before it where rollouts are one step off. A run of imports, which nothing goes on
    from, keeps its newest iteration.
    """

    older_than: timedelta | None = None
    """Remove artifacts that were committed longer ago."""
    keep_iterations: int | None = None
    """Remove artifacts of all but this many of the newest iterations."""
    keep_last_checkpoint: bool = False
    """Of checkpoints keep the newest only (one step off: two), and of the trainings before it everything else."""

    def __post_init__(self) -> None:
        if self.keep_iterations is not None and self.keep_iterations < 1:
            raise ConfigError(f"{self.keep_iterations} iterations to keep; keep at least 1, the run goes on from it")
        if self.older_than is not None and self.older_than < timedelta(0):
            raise ConfigError(f"an age of {self.older_than} is in the future; give one that is not negative")


def find_removable(
    store: RunStore,
    retention: Retention = Retention(),
    grace: timedelta = GRACE,
    needed_elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Findings:
    """What of a run may go: leftovers that nobody wrote to for `grace`, what was superseded that long ago, and what
    `retention` gives up; but for artifacts that are `needed_elsewhere`, run ids by sha256.

    Nothing is changed. A run whose document is damaged is left alone. Raises ConfigError when there is no such run.
    """
    try:
        imports = IMPORTS_KEY in store.read_run()
    except ArchiveCorrupt as error:
        return Findings([], [f"{store.run_id}: {error}"])
    now = datetime.now(UTC)
    # Listed before commits are read, or what is committed in between would pass for a leftover.
    files = store.folder.files()
    artifacts, damaged = _artifacts(store, files)
    needed = {path for artifact in artifacts for path in files_of(artifact)}
    superseded = _superseded(store, files)
    kept_aside = {path for artifact in superseded.values() if artifact for path in files_of(artifact)}
    prefix = f"{store.run_id}/"
    found = unreferenced(files, artifacts, damaged, needed | kept_aside)
    leftovers = leftovers_of(found, prefix, "no commit refers to it", now - grace)
    claims = dead_claims(claims_in(files), prefix, now, grace)
    free = {folder: one for folder, one in superseded.items() if one is None or one.ref.sha256 not in needed_elsewhere}
    aside = [_removable_aside(store, folder, one, files, needed, now - grace) for folder, one in free.items()]
    kept_from = _kept_from(artifacts, imports)
    unwanted = list(_given_up(artifacts, files, retention, now, kept_from))
    given_up = {a.ref.uri: expiry for a, expiry in unwanted if a.ref.sha256 not in needed_elsewhere}
    expiring = [_expiring(artifact, given_up.get(artifact.ref.uri), files) for artifact in artifacts]
    kept = [f"{prefix}{uri}: its commit or objects are damaged; see moe-replay archive verify" for uri in damaged]
    kept += [
        f"{prefix}{one.ref.uri}: run {needed_elsewhere[one.ref.sha256]}, which was forked from it, still needs it"
        for one in [*(a for a, _ in unwanted), *(a for a in superseded.values() if a)]
        if one.ref.sha256 in needed_elsewhere
    ]
    found = Findings.joined([leftovers, claims, *aside])
    return Findings([*found.removable, *filter(None, expiring)], [*kept, *found.left_alone])


def _superseded(store: RunStore, files: Files) -> dict[str, Artifact | None]:
    """What is kept of superseded artifacts, by folder; None for what is no artifact any more."""
    folders = {"/".join(path.split("/")[:3]) for path in files if len(path.split("/")) > 3}
    names = [folder for folder in sorted(folders) if superseded_stage(folder.rpartition("/")[2])]
    known = [folder for folder in names if RunLayout.iteration_of(folder.split("/")[1]) is not None]
    return {folder: superseded_artifact(store, folder) for folder in known}


def _removable_aside(
    store: RunStore, folder: str, artifact: Artifact | None, files: Files, needed: set[str], before: datetime
) -> Findings:
    """What was superseded before, whole; where that is not told any more, as a leftover."""
    own = {path: file for path, file in files.items() if path.startswith(f"{folder}/")}
    on = superseded_on(store, folder)
    if artifact is None or on is None:
        return leftovers_of({folder: own}, f"{store.run_id}/", "rest of something superseded", before)
    name = f"{store.run_id}/{folder}"
    if on > before:
        return Findings([], [f"{name}: superseded on {on:%Y-%m-%d %H:%M} UTC, and kept for a while"])
    own |= {path: files[path] for path in files_of(artifact) if path in files and path not in needed}
    paths = tuple(f"{store.run_id}/{path}" for path in sorted(own))
    why = f"superseded on {on:%Y-%m-%d}"
    return Findings([Removable(name, why, paths, sum(file.size for file in own.values()))], [])


def in_words(duration: timedelta) -> str:
    """A duration for messages, e.g. `30 days` or `1:30:00`."""
    return str(duration).removesuffix(", 0:00:00")


def _artifacts(store: RunStore, files: Files) -> tuple[list[Artifact], list[str]]:
    """What is committed, in order, and the folders of stages whose commit can't be read or lacks objects."""
    artifacts, damaged = [], []
    for iteration in store.iterations():
        for stage in STAGES:
            try:
                artifact = store.committed(stage, iteration)
            except ArchiveCorrupt:
                damaged.append(store.layout.stage(iteration, stage))
                continue
            if artifact is None:
                continue
            if all(path_of(artifact, stored.path) in files for stored in artifact.kept):
                artifacts.append(artifact)
            else:
                damaged.append(artifact.ref.uri)
    return artifacts, damaged


def _kept_from(artifacts: list[Artifact], imports: bool) -> int:
    """The iteration from which on everything is kept: that of the newest training, or predictor where one is fitted.

    Between a training and its fit the predictor before is still needed, with the evidence that it carries. A run
    whose rollouts are one step off takes the next from the checkpoint before the newest.
    """
    lasts = ("routes",) if imports else ("training", "predictor")
    newest = [
        max(iterations)
        for stage in lasts
        if (iterations := [artifact.commit.iteration for artifact in artifacts if artifact.commit.stage == stage])
    ]
    return min(newest, default=0) - _steps_off([one.commit for one in artifacts if one.commit.stage == "rollout"])


def _steps_off(rollouts: list[Commit]) -> int:
    """Updates between the policy of the newest rollout and the one that trains on it."""
    policy = rollouts[-1].inputs.get("policy") if rollouts else None
    if policy is None:
        return 0
    place = RunLayout.place_of(policy.uri)
    # A policy that no stage of this run made is the one that its first iteration trains.
    return rollouts[-1].iteration - (place[0] + 1 if place else rollouts[0].iteration)


def _given_up(
    artifacts: list[Artifact], files: Files, retention: Retention, now: datetime, kept_from: int
) -> Iterator[tuple[Artifact, Expiry]]:
    """What the retention asks to remove of the iterations before `kept_from`."""
    keep, age = retention.keep_iterations, retention.older_than
    last = sorted({artifact.commit.iteration for artifact in artifacts})[-keep if keep else 0 :]
    for artifact in artifacts:
        commit, listed = artifact.commit, files.get(f"{artifact.ref.uri}/{COMMIT_FILE}")
        if commit.iteration >= kept_from or commit.stage not in EXPIRING_STAGES or listed is None:
            continue
        if commit.iteration not in last:
            yield artifact, Expiry(below="", why=f"not of the last {keep} iterations", on=now)
        elif age is not None and listed.modified and listed.modified < now - age:
            yield artifact, Expiry(below="", why=f"committed more than {in_words(age)} ago", on=now)
        elif retention.keep_last_checkpoint and commit.stage == "training":
            yield artifact, Expiry(below=CHECKPOINT_FOLDER, why="not the last checkpoint", on=now)


def _expiring(artifact: Artifact, wanted: Expiry | None, files: Files) -> Removable | None:
    """What an artifact loses to `wanted`, or what an earlier removal that was cut short left of it."""
    after = artifact.placement.model_copy(update={"expiry": wanted})
    expiry = wanted if wanted and any(after.lacks(stored.path) for stored in artifact.kept) else artifact.expiry
    if expiry is None:
        return None
    after = artifact.placement.model_copy(update={"expiry": expiry})
    paths = [path_of(artifact, stored.path) for stored in artifact.commit.objects if after.lacks(stored.path)]
    present = {path: files[path].size for path in paths if path in files}
    if not present:
        return None
    run_id = artifact.commit.run_id
    return Removable(
        name=f"{run_id}/{artifact.ref.uri}/{expiry.below}".rstrip("/"),
        why=expiry.why if expiry is wanted else f"{expiry.why}; an earlier removal was cut short",
        paths=tuple(f"{run_id}/{path}" for path in present),
        bytes=sum(present.values()),
        loses=(artifact, expiry),
    )
