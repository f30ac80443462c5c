"""Cleaning storage run by run: each is searched, and what was found removed at once, so that little happens between."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.dependents import needed_by_forks
from moe_replay.archive.leftovers import find_probes, find_unborn, runs_under
from moe_replay.archive.removal import Findings, remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.errors import ArchiveCorrupt

UNBORN, PROBES = "folders that never became runs", "probes"


def searches(
    root: str, runs: Sequence[str], retention: Retention, grace: timedelta
) -> dict[str, Callable[[], Findings]]:
    """What there is to search under a root, by name: `runs`, or all runs and what never became one.

    Raises ConfigError when there is no such run; a damaged one is told of with what is found.
    """
    for run in runs:
        # A wrong name is told before anything is removed.
        with suppress(ArchiveCorrupt):
            RunStore(root, run).read_run()
    needed = needed_by_forks(root)
    found: dict[str, Callable[[], Findings]] = {
        run: partial(find_removable, RunStore(root, run), retention, grace, needed) for run in runs or runs_under(root)
    }
    # A folder that never became a run can't be named.
    unborn = {} if runs else {UNBORN: partial(find_unborn, root, grace)}
    return found | unborn | {PROBES: partial(find_probes, root, grace)}


def clean(root: str, search: Callable[[], Findings], delete: bool) -> Findings:
    """Search, and with `delete` remove what was found."""
    found = search()
    for removable in found.removable if delete else ():
        remove(root, removable)
    return found
