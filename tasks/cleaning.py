"""The task that cleans one run's storage."""

from collections.abc import Callable

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from moe_replay.archive import cleaning
from moe_replay.archive.removal import Findings
from tasks.retry import is_transient

ARTIFACT_KEY = "archive-gc"


@task(
    name="clean",
    task_run_name="clean-{name}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=is_transient,
)
def clean(root: str, name: str, search: Callable[[], Findings], delete: bool) -> Findings:
    """Search, and with `delete` remove what was found; cut short, the next attempt removes the rest."""
    return cleaning.clean(root, search, delete)


@task(name="report", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=is_transient)
def report_removable(root: str, found: Findings, deleted: bool) -> list[dict[str, str | int]]:
    """Show in the Prefect UI what was or could be removed; returns the rows of that table."""
    rows: list[dict[str, str | int]] = [
        {"name": one.name, "why": one.why, "objects": len(one.paths), "bytes": one.bytes} for one in found.removable
    ]
    total = sum(one.bytes for one in found.removable)
    verb = "removed" if deleted else "can be removed"
    get_run_logger().info("%d places, %d bytes under %s: %s", len(rows), total, root, verb)
    told = [f"{len(rows)} places with {total:,} bytes under `{root}` {'were ' if deleted else ''}{verb}."]
    told += [f"Left alone: {line}" for line in found.left_alone]
    create_table_artifact(table=rows, key=ARTIFACT_KEY, description="\n\n".join(told))
    return rows
