"""What may be removed from a run's storage, and why: leftovers of dead writers, and artifacts that have served.

Removing an artifact takes its objects and never its commit: what was made from it refers to the commit, whose metrics
stay too. That they are gone is written down first (`placement`), so that a cleaning cut short looks like no damage.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.claims import CLAIMS_FOLDER, claimed_by
from moe_replay.archive.layout import (
    CHECKPOINT_FOLDER,
    COMMIT_FILE,
    IMPORTS_KEY,
    RUN_FILE,
    STAGES,
    TIMING_FILE,
    RunLayout,
    attempted_stage,
    check_run_id,
    placement_file,
)
from moe_replay.archive.lease import TTL_SECONDS
from moe_replay.archive.placement import Expiry
from moe_replay.archive.storage import Storage, StoredFile
from moe_replay.errors import ArchiveCorrupt, ConfigError

EXPIRING_STAGES = tuple(stage for stage in STAGES if stage != "evaluation")
"""Stages whose objects retention may remove; an evaluation's scores are small, and what a run was made for."""

GRACE = timedelta(hours=1)
"""How long nothing may have been written to a leftover before it is taken for one.

A live writer must not pause for longer between objects. Before the first it may, as rollout and training do: to lose
the note that it began does a writer no harm.
"""

Files = dict[str, StoredFile]

_PROBE = re.compile(r"_probe-[0-9a-f]{32}")
_PLACEMENT = re.compile(placement_file("[0-9a-f]{64}"))
_PARTIAL_RUN_FILE = re.compile(rf"\.{re.escape(RUN_FILE)}\.[0-9a-f]{{32}}")


@dataclass(frozen=True)
class Retention:
    """Which artifacts a user no longer wants; by default all are kept.

    Whatever is asked, the newest iteration whose training is committed and all after it keep everything: the run goes
    on from there. A run of imports, which nothing goes on from, keeps its newest iteration.
    """

    older_than: timedelta | None = None
    """Remove artifacts that were committed longer ago."""
    keep_iterations: int | None = None
    """Remove artifacts of all but this many of the newest iterations."""
    keep_last_checkpoint: bool = False
    """Of checkpoints keep the newest only, and of the trainings before it everything else."""

    def __post_init__(self) -> None:
        if self.keep_iterations is not None and self.keep_iterations < 1:
            raise ConfigError(f"{self.keep_iterations} iterations to keep; keep at least 1, the run goes on from it")
        if self.older_than is not None and self.older_than < timedelta(0):
            raise ConfigError(f"an age of {self.older_than} is in the future; give one that is not negative")


@dataclass(frozen=True)
class Removable:
    """Objects that can go together, for one reason."""

    name: str
    """Folder or object, relative to the root."""
    why: str
    paths: tuple[str, ...]
    """Relative to the root."""
    bytes: int
    loses: tuple[Artifact, Expiry] | None = None
    """The artifact that loses them, and what is to be written down of it before; none for leftovers."""


@dataclass(frozen=True)
class Findings:
    """What was found in one run, directly under a root, or in all."""

    removable: list[Removable]
    left_alone: list[str]
    """What was not judged, each with the reason."""

    @classmethod
    def joined(cls, findings: Sequence["Findings"]) -> "Findings":
        """All of several findings, in order."""
        return cls(
            [removable for found in findings for removable in found.removable],
            [line for found in findings for line in found.left_alone],
        )


def runs_under(root: str) -> list[str]:
    """Ids of the runs under a root, sorted."""
    return [name for name in Storage.at(root).folders() if _is_run_id(name) and RunStore(root, name).exists()]


def find_probes(root: str, grace: timedelta = GRACE) -> Findings:
    """Probes of the root by processes that died before they removed them."""
    files = Storage.at(root).files(deep=False)
    probes = {path: {path: file} for path, file in files.items() if _PROBE.fullmatch(path)}
    return _leftovers(probes, "", "probe of a process that died", datetime.now(UTC) - grace)


def find_unborn(root: str, grace: timedelta = GRACE) -> Findings:
    """Attempts and claims in folders that never became runs, as an import or a start that was killed leaves them.

    A folder with no `run.json` is judged only where it holds such and nothing else; any other may be anyone's.
    """
    now = datetime.now(UTC)
    names = [name for name in Storage.at(root).folders() if _is_run_id(name) and not RunStore(root, name).exists()]
    found = []
    for name in names:
        attempts, claims = _leftovers_alone(Storage.at(root) / name)
        found.append(_leftovers(attempts, f"{name}/", "no run came of it", now - grace))
        found.append(_dead_claims(claims, f"{name}/", now, grace))
    return Findings.joined(found)


def find_removable(store: RunStore, retention: Retention = Retention(), grace: timedelta = GRACE) -> Findings:
    """What of a run may go: leftovers that nobody wrote to for `grace`, and what `retention` gives up.

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
    prefix = f"{store.run_id}/"
    leftovers = _leftovers(_unreferenced(files, artifacts, damaged), prefix, "no commit refers to it", now - grace)
    claims = _dead_claims(_claims_in(files), prefix, now, grace)
    kept_from = _kept_from(artifacts, imports)
    given_up = {a.ref.uri: expiry for a, expiry in _given_up(artifacts, files, retention, now, kept_from)}
    expiring = [_expiring(artifact, given_up.get(artifact.ref.uri), files) for artifact in artifacts]
    kept = [f"{prefix}{uri}: its commit or objects are damaged; see moe-replay archive verify" for uri in damaged]
    found = Findings.joined([leftovers, claims])
    return Findings([*found.removable, *filter(None, expiring)], [*kept, *found.left_alone])


def remove(root: str, removable: Removable) -> None:
    """Remove what was found and not committed since; when that is cut short, the next search finds the rest."""
    storage, paths = Storage.at(root), removable.paths
    if removable.loses:
        artifact, expiry = removable.loses
        placement = artifact.placement.model_copy(update={"expiry": expiry})
        placement.write(storage / artifact.commit.run_id / artifact.ref.uri, artifact.ref.sha256)
    else:
        # A writer that slept may have woken.
        committed = _committed_in(root, removable.name)
        paths = tuple(path for path in paths if path not in committed)
    storage.remove_each(paths)
    if folder := storage.local_folder:
        _remove_empty_folders(folder, paths)


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
            if all(_path_of(artifact, stored.path) in files for stored in artifact.kept):
                artifacts.append(artifact)
            else:
                damaged.append(artifact.ref.uri)
    return artifacts, damaged


def _unreferenced(files: Files, artifacts: list[Artifact], damaged: list[str]) -> dict[str, Files]:
    """Files in stages' and attempts' folders that no commit refers to, by folder; foreign folders are not looked at.

    Around a damaged artifact nothing is judged: what lies there is what it could be repaired with. Nor is a
    placement before there is a commit: a resumed run writes one of that very name a moment before it commits.
    """
    committed = {artifact.ref.uri for artifact in artifacts}
    referenced = {path for artifact in artifacts for path in _files_of(artifact)}
    damaged_places = {RunLayout.place_of(uri) for uri in damaged}
    found: dict[str, Files] = defaultdict(dict)
    for path, file in files.items():
        parts = path.split("/")
        if _PARTIAL_RUN_FILE.fullmatch(path):
            found[path][path] = file
        if len(parts) < 4 or parts[0] != "iterations" or path in referenced:
            continue
        place = (RunLayout.iteration_of(parts[1]), attempted_stage(parts[2]) or parts[2])
        if place[0] is None or place[1] not in STAGES or place in damaged_places:
            continue
        folder = "/".join(parts[:3])
        if folder in committed or not _PLACEMENT.fullmatch("/".join(parts[3:])):
            found[folder][path] = file
    return found


def _leftovers_alone(folder: Storage) -> tuple[dict[str, Files], dict[str, Files]]:
    """Files of a folder that holds attempts and claims and nothing else, by attempt and by claim; none of any other."""
    attempts: dict[str, Files] = defaultdict(dict)
    # A foreign folder may be huge, so it is listed whole only when it looks like a run's.
    if not {"iterations", CLAIMS_FOLDER}.issuperset(folder.folders()) or folder.files(deep=False):
        return {}, {}
    files = folder.files()
    claims = _claims_in(files)
    for path in files.keys() - {path for claim in claims.values() for path in claim}:
        parts = path.split("/")
        known = len(parts) > 3 and RunLayout.iteration_of(parts[1]) is not None and attempted_stage(parts[2])
        if parts[0] != "iterations" or not known:
            return {}, {}
        attempts["/".join(parts[:3])][path] = files[path]
    return attempts, claims


def _claims_in(files: Files) -> dict[str, Files]:
    """The files of each claim on a run."""
    found: dict[str, Files] = defaultdict(dict)
    for path, file in files.items():
        if token := claimed_by(path):
            found[f"{CLAIMS_FOLDER}/{token}"][path] = file
    return found


def _dead_claims(claims: dict[str, Files], prefix: str, now: datetime, grace: timedelta) -> Findings:
    # However short the grace, a runner that lives keeps its claim.
    return _leftovers(claims, prefix, "claim of a runner that died", now - max(grace, timedelta(seconds=TTL_SECONDS)))


def _files_of(artifact: Artifact) -> Iterator[str]:
    """Everything that belongs to a committed artifact, and what retention removed of it, relative to the run."""
    for name in (COMMIT_FILE, TIMING_FILE, placement_file(artifact.ref.sha256)):
        yield f"{artifact.ref.uri}/{name}"
    for stored in artifact.commit.objects:
        yield _path_of(artifact, stored.path)


def _path_of(artifact: Artifact, path: str) -> str:
    """Where an object lies, relative to the run."""
    iteration, _, stage = artifact.ref.uri.rpartition("/")
    return f"{iteration}/{artifact.placement.folder or stage}/{path}"


def _leftovers(found: dict[str, Files], prefix: str, why: str, before: datetime) -> Findings:
    removable, left_alone = [], []
    for folder, files in sorted(found.items()):
        name = f"{prefix}{folder}"
        # Where storage does not tell the time, nothing tells a leftover from the work of a live writer.
        if all(file.modified and file.modified <= before for file in files.values()):
            paths = tuple(f"{prefix}{path}" for path in sorted(files))
            removable.append(Removable(name, why, paths, sum(file.size for file in files.values())))
        else:
            left_alone.append(f"{name}: written to since {before:%Y-%m-%d %H:%M} UTC, perhaps by a live writer")
    return Findings(removable, left_alone)


def _kept_from(artifacts: list[Artifact], imports: bool) -> int:
    """The iteration from which on everything is kept: that of the newest training, or predictor where one is fitted.

    Between a training and its fit the predictor before is still needed, with the evidence that it carries.
    """
    lasts = ("routes",) if imports else ("training", "predictor")
    newest = [
        max(iterations)
        for stage in lasts
        if (iterations := [artifact.commit.iteration for artifact in artifacts if artifact.commit.stage == stage])
    ]
    return min(newest, default=0)


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
    paths = [_path_of(artifact, stored.path) for stored in artifact.commit.objects if after.lacks(stored.path)]
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


def _committed_in(root: str, name: str) -> set[str]:
    """Paths of what is committed of the stage that a leftover's folder is of, relative to the root."""
    run_id, *parts = name.split("/")
    if len(parts) != 3:
        return set()
    artifact = RunStore(root, run_id).committed(attempted_stage(parts[2]) or parts[2], int(parts[1]))
    return set() if artifact is None else {f"{run_id}/{path}" for path in _files_of(artifact)}


def _remove_empty_folders(root: Path, paths: Iterable[str]) -> None:
    # The last parent is the root itself.
    folders = {parent for path in paths for parent in PurePosixPath(path).parents[:-1]}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        # One that is not empty stays.
        with suppress(OSError):
            (root / folder).rmdir()


def _is_run_id(name: str) -> bool:
    try:
        check_run_id(name)
    except ConfigError:
        return False
    return True
