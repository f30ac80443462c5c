"""Cleaning of storage: what dead writers left, and artifacts that have served."""

from datetime import timedelta

from prefect import flow

from moe_replay.archive.cleaning import searches
from moe_replay.archive.leftovers import GRACE
from moe_replay.archive.removal import Findings
from moe_replay.archive.retention import Retention
from moe_replay.config import RunConfig
from moe_replay.places import run_root
from moe_replay.sections import StorageConfig
from tasks.cleaning import clean, report_removable
from tasks.failures import LOGGED_FAILURES


@flow(name="archive-gc", persist_result=False, **LOGGED_FAILURES)
def archive_gc(
    root: str | None = None,
    runs: list[str] = [],  # noqa: B006 (never changed)
    older_than: timedelta | None = None,
    keep_iterations: int | None = None,
    keep_last_checkpoint: bool = False,
    grace: timedelta = GRACE,
    delete: bool = False,
) -> list[dict[str, str | int]]:
    """Show what can be removed from storage and why; with `delete`, remove it (`moe-replay archive gc`).

    Args:
        root: fsspec URL under which runs lie; by default `runs` under MOE_REPLAY_HOME.
        runs: The runs to look at; by default all under the root.
        older_than: Also the artifacts that were committed longer ago, for example P30D.
        keep_iterations: Also the artifacts of all but so many of a run's newest iterations.
        keep_last_checkpoint: Also the checkpoints of all but the newest training, or two one step off.
        grace: How long nothing may have been written to a leftover; a live writer must not pause for longer.
        delete: Remove it. Without this nothing is changed.
    """
    url = run_root(RunConfig(storage=StorageConfig(root=root)))
    retention = Retention(older_than, keep_iterations, keep_last_checkpoint)
    searched = searches(url, runs, retention, grace)
    found = Findings.joined([clean(url, name, search, delete) for name, search in searched.items()])
    return report_removable(url, found, delete)
