"""`moe-replay archive inspect` and `verify`: look at what a run holds."""

import json
import sys

from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import STAGES
from moe_replay.archive.routes import RouteArchive, verify_routes
from moe_replay.cli.console import Json, Root, out, root_of
from moe_replay.errors import ConfigError, ReplayError


def inspect(run_id: str, *, iteration: int | None = None, root: Root = None, json_: Json = False) -> None:
    """Show what the routing archive of an iteration holds, and where it comes from.

    Parameters
    ----------
    run_id
        The run.
    iteration
        By default the last that has an archive.
    root
        fsspec URL under which runs lie.
    json_
        Print one JSON object and nothing else.
    """
    summary = open_archive(RunStore(root_of(root), run_id), iteration).summary().model_dump(mode="json")
    if json_:
        print(json.dumps(summary))
        return
    table = Table(title=f"routes of run {run_id}, iteration {summary['provenance']['iteration']}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    provenance = summary.pop("provenance")
    for name, value in summary.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    table.add_row("row groups", str(len(provenance["row_groups"])))
    for number, origin in enumerate(provenance["origins"], start=1):
        table.add_section()
        for name, value in origin.items():
            shown = "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(f"origin {number} {name}", shown)
    out.print(table)


def verify(run_id: str, *, root: Root = None, json_: Json = False) -> None:
    """Re-read every object of a run and check checksums and invariants; exit code 1 when something is wrong.

    Also that what each artifact was made from is still there. An evaluation that is gone is not missed: nothing is made
    from it.

    Parameters
    ----------
    run_id
        The run.
    root
        fsspec URL under which runs lie.
    json_
        Print one JSON object and nothing else.
    """
    store = RunStore(root_of(root), run_id)
    store.read_run()
    checked, problems, removed = 0, [], []
    for iteration in store.iterations():
        for stage in STAGES:
            found = _problems(store, stage, iteration)
            checked += found is not None
            problems += found or []
            removed += _removed(store, stage, iteration) if found == [] else []
    if json_:
        print(json.dumps({"run_id": run_id, "artifacts": checked, "problems": problems, "removed": removed}))
    elif problems:
        for problem in problems:
            out.print(f"[red]wrong[/]: {escape(problem)}", highlight=False, soft_wrap=True)
    else:
        out.print(f"all {checked} artifacts of run {run_id} are as committed")
    if removed and not json_:
        for told in removed:
            out.print(f"[dim]not there[/]: {escape(told)}", highlight=False, soft_wrap=True)
    if problems:
        sys.exit(1)


def open_archive(store: RunStore, iteration: int | None) -> RouteArchive:
    """The routing archive of an iteration, by default the last that has one; raises ConfigError where there is none."""
    store.read_run()
    wanted = store.iterations()[::-1] if iteration is None else [iteration]
    for candidate in wanted:
        ref = store.commit_of("routes", candidate)
        if ref is not None:
            return RouteArchive.open(store.open(ref))
    which = f"iteration {iteration}" if iteration is not None else "any iteration"
    raise ConfigError(f"run {store.run_id} has no routing archive of {which}; see moe-replay status {store.run_id}")


def _problems(store: RunStore, stage: str, iteration: int) -> list[str] | None:
    """What is wrong with one stage's artifact; none when the stage is not committed."""
    try:
        ref = store.commit_of(stage, iteration)
        if ref is None:
            return None
        artifact = store.open(ref)
        readable = stage == "routes" and artifact.expiry is None
        return store.lost_inputs(artifact) + (verify_routes(artifact) if readable else artifact.problems())
    except ReplayError as error:
        return [str(error)]


def _removed(store: RunStore, stage: str, iteration: int) -> list[str]:
    """What retention took of one stage's artifact, which is no fault of it."""
    ref = store.commit_of(stage, iteration)
    expiry = store.open(ref).expiry if ref is not None else None
    if ref is None or expiry is None:
        return []
    return [f"{ref.uri}/{expiry.below or ''}: removed by retention on {expiry.on:%Y-%m-%d} ({expiry.why})"]
