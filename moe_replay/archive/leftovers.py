"""What writers that died left in storage, and attempts that came to nothing."""

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.claims import CLAIMS_FOLDER, claimed_by
from moe_replay.archive.layout import (
    RUN_FILE,
    STAGES,
    RunLayout,
    attempted_stage,
    check_run_id,
    placement_file,
)
from moe_replay.archive.lease import TTL_SECONDS
from moe_replay.archive.removal import Files, Findings, Removable
from moe_replay.archive.storage import Storage
from moe_replay.errors import ConfigError

GRACE = timedelta(hours=1)
"""How long nothing may have been written to a leftover before it is taken for one.

A live writer must not pause for longer between objects. Before the first it may, as rollout and training do: to lose
the note that it began does a writer no harm.
"""

_PROBE = re.compile(r"_probe-[0-9a-f]{32}")
_PLACEMENT = re.compile(placement_file("[0-9a-f]{64}"))
_PARTIAL_RUN_FILE = re.compile(rf"\.{re.escape(RUN_FILE)}\.[0-9a-f]{{32}}")


def runs_under(root: str) -> list[str]:
    """Ids of the runs under a root, sorted."""
    return [name for name in Storage.at(root).folders() if _is_run_id(name) and RunStore(root, name).exists()]


def find_probes(root: str, grace: timedelta = GRACE) -> Findings:
    """Probes of the root by processes that died before they removed them."""
    files = Storage.at(root).files(deep=False)
    probes = {path: {path: file} for path, file in files.items() if _PROBE.fullmatch(path)}
    return leftovers_of(probes, "", "probe of a process that died", datetime.now(UTC) - grace)


def find_unborn(root: str, grace: timedelta = GRACE) -> Findings:
    """Attempts and claims in folders that never became runs, as an import or a start that was killed leaves them.

    A folder with no `run.json` is judged only where it holds such and nothing else; any other may be anyone's.
    """
    now = datetime.now(UTC)
    names = [name for name in Storage.at(root).folders() if _is_run_id(name) and not RunStore(root, name).exists()]
    found = []
    for name in names:
        attempts, claims = _leftovers_alone(Storage.at(root) / name)
        found.append(leftovers_of(attempts, f"{name}/", "no run came of it", now - grace))
        found.append(dead_claims(claims, f"{name}/", now, grace))
    return Findings.joined(found)


def claims_in(files: Files) -> dict[str, Files]:
    """The files of each claim on a run."""
    found: dict[str, Files] = defaultdict(dict)
    for path, file in files.items():
        if token := claimed_by(path):
            found[f"{CLAIMS_FOLDER}/{token}"][path] = file
    return found


def dead_claims(claims: dict[str, Files], prefix: str, now: datetime, grace: timedelta) -> Findings:
    """Claims, by folder, as leftovers; however short the grace, a runner that lives keeps its claim."""
    return leftovers_of(claims, prefix, "claim of a runner that died", now - max(grace, timedelta(seconds=TTL_SECONDS)))


def leftovers_of(found: dict[str, Files], prefix: str, why: str, before: datetime) -> Findings:
    """Files by folder, as leftovers where none of a folder was written after `before`."""
    removable, left_alone = [], []
    for folder, files in sorted(found.items()):
        name = f"{prefix}{folder}"
        # Where storage does not tell the time, nothing tells a leftover from the work of a live writer.
        if all(file.modified and file.modified <= before for file in files.values()):
            paths = tuple(f"{prefix}{path}" for path in sorted(files))
            removable.append(Removable(name, why, paths, sum(file.size for file in files.values())))
        else:
            left_alone.append(f"{name}: written to after {before:%Y-%m-%d %H:%M} UTC, perhaps by a live writer")
    return Findings(removable, left_alone)


def unreferenced(
    files: Files, artifacts: Sequence[Artifact], damaged: Sequence[str], referenced: set[str]
) -> dict[str, Files]:
    """Files in stages' and attempts' folders that no commit refers to, by folder; foreign folders are not looked at.

    Around a damaged artifact nothing is judged: what lies there is what it could be repaired with. Nor is a
    placement before there is a commit: a resumed run writes one of that very name a moment before it commits.
    """
    committed = {artifact.ref.uri for artifact in artifacts}
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
    claims = claims_in(files)
    for path in files.keys() - {path for claim in claims.values() for path in claim}:
        parts = path.split("/")
        known = len(parts) > 3 and RunLayout.iteration_of(parts[1]) is not None and attempted_stage(parts[2])
        if parts[0] != "iterations" or not known:
            return {}, {}
        attempts["/".join(parts[:3])][path] = files[path]
    return attempts, claims


def _is_run_id(name: str) -> bool:
    try:
        check_run_id(name)
    except ConfigError:
        return False
    return True
