"""`moe-replay archive inspect` and `verify`: look at what a run holds."""

import json
import sys

from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.evolution import has_evolution, verify_evolution
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
    """
    store = RunStore(root_of(root), run_id)
    store.read_run()
    checked, problems, removed = 0, [], []
    for iteration in store.iterations():
        for stage in STAGES:
            try:
                artifact = store.committed(stage, iteration)
                if artifact is None:
                    continue
                found = store.lost_inputs(artifact) + _problems(artifact)
                removed += _removed(artifact) if not found else []
            except ReplayError as error:
                found = [str(error)]
            checked += 1
            problems += found
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
        artifact = store.committed("routes", candidate)
        if artifact is not None:
            return RouteArchive.open(artifact)
    which = f"iteration {iteration}" if iteration is not None else "any iteration"
    raise ConfigError(f"run {store.run_id} has no routing archive of {which}; see moe-replay status {store.run_id}")


def _problems(artifact: Artifact) -> list[str]:
    if artifact.commit.stage == "routes" and artifact.expiry is None:
        return verify_routes(artifact)
    return verify_evolution(artifact) if has_evolution(artifact) else artifact.problems()


def _removed(artifact: Artifact) -> list[str]:
    """What retention took of an artifact, which is no fault of it."""
    uri, expiry = artifact.ref.uri, artifact.expiry
    if expiry is None:
        return []
    return [f"{uri}/{expiry.below}: removed by retention on {expiry.on:%Y-%m-%d} ({expiry.why})"]
