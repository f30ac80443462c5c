"""`moe-replay archive gc`: remove what dead writers left, and artifacts that have served."""

import json
from datetime import timedelta
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from moe_replay.archive.cleaning import clean, searches
from moe_replay.archive.leftovers import GRACE
from moe_replay.archive.removal import Findings, Removable
from moe_replay.archive.retention import Retention
from moe_replay.cli.console import Json, Root, out, root_of


def gc(
    *runs: str,
    older_than: timedelta | None = None,
    keep_iterations: int | None = None,
    keep_last_checkpoint: Annotated[bool, Parameter(negative="")] = False,
    grace: timedelta = GRACE,
    delete: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Show what can be removed from storage and why; with --delete, remove it.

    Always leftovers of writers that died. Artifacts only where an option asks for it, never those of the newest trained
    iteration (of imports: the newest), and never evaluations; commits and metrics stay, so a run goes on as before.

    Parameters
    ----------
    runs
        The runs to look at; by default all under the root.
    older_than
        Also the artifacts that were committed longer ago, for example 30d or 12h.
    keep_iterations
        Also the artifacts of all but so many of a run's newest iterations.
    keep_last_checkpoint
        Also the checkpoints of all but the newest training, or the newest two where rollouts are one step off.
    grace
        How long nothing may have been written to a leftover; a live writer must not pause for longer between objects.
    delete
        Remove it. Without this nothing is changed.
    """
    url = root_of(root)
    retention = Retention(older_than, keep_iterations, keep_last_checkpoint)
    searched = searches(url, runs, retention, grace).values()
    found = Findings.joined([clean(url, search, delete) for search in searched])
    if json_:
        rows = [_row(removable) for removable in found.removable]
        print(json.dumps({"root": url, "deleted": delete, "removable": rows, "left_alone": found.left_alone}))
    else:
        _show(found, delete)


def _row(removable: Removable) -> dict[str, str | int]:
    return {
        "name": removable.name,
        "why": removable.why,
        "objects": len(removable.paths),
        "bytes": removable.bytes,
    }


def _show(found: Findings, deleted: bool) -> None:
    for line in found.left_alone:
        out.print(f"left alone: {escape(line)}", highlight=False, soft_wrap=True)
    if not found.removable:
        out.print("nothing to remove")
        return
    table = Table(title="removed" if deleted else "can be removed", title_justify="left", show_footer=True)
    total = sum(removable.bytes for removable in found.removable)
    table.add_column("what", footer="all", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("objects", f"{sum(len(r.paths) for r in found.removable):,}", justify="right")
    table.add_column("bytes", f"{total:,}", justify="right")
    for removable in found.removable:
        table.add_row(
            escape(removable.name), escape(removable.why), f"{len(removable.paths):,}", f"{removable.bytes:,}"
        )
    out.print(table)
    if not deleted:
        out.print("\nnothing was changed; to remove it, give the same command with --delete", highlight=False)
