"""`moe-replay status`: what is committed of a run, who runs it and what is next."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moe_replay.archive.artifacts import RunStore, StageStatus
from moe_replay.archive.claims import Claim, find_holder
from moe_replay.cli.console import Json, Root, command_name, err, out, root_of
from moe_replay.errors import ConfigError
from moe_replay.places import as_argument
from moe_replay.stages.overview import RunOverview

_LOOK_AGAIN_SECONDS = 2.0
_LINES_AROUND = 9
"""Of a terminal, for title, heading and what is told below the table."""


def status(
    run_id: str,
    *,
    watch: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Show which stages of each iteration are committed and who runs the run, from storage alone.

    Parameters
    ----------
    run_id
        The run.
    watch
        Go on looking until the run is complete, or waits for a decision and nobody works on it. Where output is no
        terminal, a line is printed for each stage as it is committed; with --json an object for each change.
    """
    store = RunStore(root_of(root), run_id)
    _await_creation(store, watch)
    named = as_argument(run_id, root)
    seen = RunOverview.of(store)
    if json_:
        for told in _changes(_document(store, one, root) for one in (_looks(store, seen) if watch else [seen])):
            print(json.dumps(told), flush=True)
    elif not watch:
        out.print(_table(run_id, seen.stages))
        for told in _told(seen, named):
            _say(told.plain)
    elif out.is_terminal:
        with Live(console=out, auto_refresh=False) as live:
            for look in _looks(store, seen):
                shown = look.stages[-max(1, out.height - _LINES_AROUND) :]
                live.update(Group(_table(run_id, shown), *_told(look, named)), refresh=True)
    else:
        _print_lines(_looks(store, seen), named)


def _await_creation(store: RunStore, watch: bool) -> None:
    """Wait for a run that somebody prepares, or without `watch` say that; the rest is for who reads it."""
    while not store.exists() and (holder := find_holder(store.folder)):
        told = f"run {store.run_id} is not there yet: {holder.runner} prepares it"
        if not watch:
            raise ConfigError(f"{told}; look again in a while, or with --watch")
        err.print(told, highlight=False, markup=False, soft_wrap=True)
        time.sleep(_LOOK_AGAIN_SECONDS)


def _looks(store: RunStore, seen: RunOverview) -> Iterator[RunOverview]:
    """The run now and every other moment, until nothing more comes of it or the user has seen enough."""
    yield seen
    while not (seen.is_over or seen.is_stopped):
        time.sleep(_LOOK_AGAIN_SECONDS)
        seen = RunOverview.of(store, seen)
        yield seen


def _print_lines(looks: Iterator[RunOverview], named: str) -> None:
    """What is committed, a line a stage; and what is told beside, whenever that changes."""
    printed: set[tuple[int, str, datetime | None]] = set()
    before: list[str] = []
    for seen in looks:
        for one in seen.stages:
            key = (one.iteration, one.stage, one.finished)
            if one.state == "committed" and key not in printed:
                printed.add(key)
                _say(f"iteration {one.iteration}: {one.stage} committed, {one.bytes:,} bytes, {_seconds(one)} s")
        # Heartbeats are not worth a line.
        told = [text.plain for text in _told(seen, named, with_heartbeat=False)]
        for line in told:
            if line not in before:
                _say(line)
        before = told


def _changes(documents: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those that differ from the one before in more than the time of the heartbeat."""
    before: tuple[Any, ...] | None = None
    for document in documents:
        running = document["running"]
        compared = ({**document, "running": None}, running and (running["host"], running["pid"], running["since"]))
        if compared != before:
            yield document
        before = compared


def _document(store: RunStore, seen: RunOverview, root: str | None) -> dict[str, Any]:
    rows = [
        {
            "iteration": one.iteration,
            "stage": one.stage,
            "state": one.state,
            "bytes": one.bytes,
            "expired_bytes": one.expired_bytes,
            "seconds": one.seconds,
            "finished": one.finished.isoformat() if one.finished else None,
        }
        for one in seen.stages
    ]
    following = seen.following and {"iteration": seen.following[0], "stage": seen.following[1]}
    return {
        "run_id": store.run_id,
        "root": root_of(root),
        "running": _running(seen.runner),
        "next": following,
        "waits_for_decision": seen.alarm and seen.alarm.reason,
        "stages": rows,
    }


def _table(run_id: str, stages: tuple[StageStatus, ...]) -> Table:
    table = Table(title=f"run {run_id}", title_justify="left")
    for heading in ("iteration", "stage", "state", "bytes", "expired", "seconds"):
        table.add_column(heading, justify="left" if heading in ("stage", "state") else "right")
    for one in stages:
        sizes = (f"{n:,}" if n else "-" for n in (one.bytes, one.expired_bytes))
        table.add_row(str(one.iteration), one.stage, one.state, *sizes, _seconds(one))
    return table


def _told(seen: RunOverview, named: str, with_heartbeat: bool = True) -> Iterator[Text]:
    """Who runs the run, what is next, and what to do."""
    at = f"{seen.following[1]} of iteration {seen.following[0]}" if seen.following else None
    if running := _running(seen.runner):
        heartbeat = f", heartbeat {running['heartbeat_seconds_ago']:.0f} s ago" if with_heartbeat else ""
        yield Text("running: {host} pid {pid} since {since}".format(**running) + heartbeat)
        if at and seen.alarm:
            # Storage does not tell a flow run that shows a form from a command that is about to end.
            yield Text(
                f"{at} waits for a decision: {seen.alarm.reason}; if the runner is a flow run that is paused for it, "
                f"answer in Prefect (Resume), or cancel that; once no runner is there: {_deciding(seen, named)}"
            )
        elif at:
            beside = f", beside it {seen.beside[1]} of iteration {seen.beside[0]}" if seen.beside else ""
            yield Text(f"at work: {at}{beside}")
    elif seen.alarm:
        yield Text(f"{at} waits for a decision: {seen.alarm.reason}; {_deciding(seen, named)}")
    elif at and seen.plan:
        yield Text(f"next: {at}, of {seen.plan.iterations.stop} iterations; {command_name()} resume {named}")
    elif seen.plan:
        yield Text(f"complete: all of {seen.plan.iterations.stop} iterations")


def _deciding(seen: RunOverview, named: str) -> str:
    """The command that decides what becomes of the batch that waits."""
    assert seen.alarm is not None
    assert seen.plan is not None, "only what is trained raises alarms"
    return f"{command_name()} resume {named} --decide {'|'.join(seen.alarm.actions(seen.plan.config.method))}"


def _running(holder: Claim | None) -> dict[str, Any] | None:
    """Who has the run; the age of the heartbeat is right as far as its clock and ours agree."""
    if holder is None:
        return None
    return {
        "host": holder.runner.host,
        "pid": holder.runner.pid,
        "since": holder.began.isoformat(timespec="seconds"),
        "heartbeat_seconds_ago": max(0.0, (datetime.now(UTC) - holder.at).total_seconds()),
    }


def _seconds(stage: StageStatus) -> str:
    return "-" if stage.seconds is None else f"{stage.seconds:.2f}"


def _say(told: str) -> None:
    out.print(told, highlight=False, markup=False, soft_wrap=True)
