"""`moe-replay archive`: look at the routing archive of a run."""

import json
import sys

from cyclopts import App
from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import STAGES
from moe_replay.archive.routes import RouteArchive, verify_routes
from moe_replay.cli.console import Json, Root, out, root_of
from moe_replay.errors import ConfigError, ReplayError

archive = App(name="archive", help="Look at the routing archive of a run.")


@archive.command
def inspect(run_id: str, *, iteration: int | None = None, root: Root = None, json_: Json = False) -> None:
    """Show what the routing archive of an iteration (by default the last) holds, and where it comes from."""
    summary = open_archive(RunStore(root_of(root), run_id), iteration).summary().model_dump(mode="json")
    if json_:
        print(json.dumps(summary))
        return
    table = Table(title=f"routes of run {run_id}, iteration {summary['provenance']['iteration']}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        for key, inner in value.items() if isinstance(value, dict) else [(name, value)]:
            shown = f"{inner:.2f}" if isinstance(inner, float) else str(inner)
            table.add_row(key if name != "provenance" else f"provenance.{key}", shown)
    out.print(table)


@archive.command
def verify(run_id: str, *, root: Root = None, json_: Json = False) -> None:
    """Re-read every object of a run and check checksums and invariants; exit code 1 when something is wrong."""
    store = RunStore(root_of(root), run_id)
    store.read_run()
    checked, problems = 0, []
    for iteration in store.iterations():
        for stage in STAGES:
            found = _problems(store, stage, iteration)
            checked += found is not None
            problems += found or []
    if json_:
        print(json.dumps({"run_id": run_id, "artifacts": checked, "problems": problems}))
    elif problems:
        for problem in problems:
            out.print(f"[red]wrong[/]: {escape(problem)}", highlight=False, soft_wrap=True)
    else:
        out.print(f"all {checked} artifacts of run {run_id} are as committed")
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
        problems = store.verify(ref)
        return problems or (verify_routes(store.open(ref)) if stage == "routes" else [])
    except ReplayError as error:
        return [str(error)]
