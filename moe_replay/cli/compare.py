"""`moe-replay compare`: methods beside each other, from runs that exist or are trained for it."""

import re
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Json, Quiet, Root, command_name, console_for_progress, out, root_of
from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, parse_override
from moe_replay.errors import ConfigError, ReplayError
from moe_replay.reports.comparison import Cell, GroupComparison, MethodComparison, compare_methods
from moe_replay.reports.groups import group_runs
from moe_replay.reports.html import REPORT_FILE, command_of, write_report
from moe_replay.reports.measures import Unit, shown
from moe_replay.reports.runs import read_results
from moe_replay.reports.summary import summary_of

if TYPE_CHECKING:
    from flows.compare import Compared

_TITLE = "Routing replay: methods compared"
_OWN = ("method", "seed", "tracking.comparison")
"""Settings that a comparison gives each of its runs."""


def compare(
    *runs: str,
    methods: str | None = None,
    seeds: str | None = None,
    name: str | None = None,
    config: Path | None = None,
    iterations: int | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    baseline: str | None = None,
    out_: Annotated[Path | None, Parameter(name="--out")] = None,
    root: Root = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on one model and the same data, each against a baseline, with intervals.

    Either of runs that exist, or, with --methods, of runs that are trained now, every method from every seed.

    Runs may differ in method, seed, κ (each κ is a table of its own) and in how predictors are fitted.

    Parameters
    ----------
    runs
        The runs to compare.
    methods
        Presets to train, parted by commas: grpo,r3,pr2.
    seeds
        Seeds to train each from, parted by commas; by default 0,1,2.
    name
        Of the comparison that is trained; a name that exists goes on with it.
    config
        A TOML file for what is trained; by default the embedded model and task.
    iterations
        Rollout-and-train cycles of each run that is trained.
    set_
        A setting of what is trained as key=value with a dotted key; may be repeated.
    baseline
        The method that others are compared with; by default grpo where it is there, else that of the first run.
    out_
        Also write a report to this folder: one HTML file, and its figures as PNG files.
    """
    trained = None
    training_only = {"seeds": seeds, "name": name, "config": config, "iterations": iterations, "set": set_}
    if methods is not None:
        if runs:
            raise ConfigError(f"--methods trains runs of its own, and {', '.join(runs)} exist; give one or the other")
        settings, console = _settings(config, iterations, set_, root), console_for_progress(json_, quiet)
        trained = _train(methods.split(","), seeds or "0,1,2", name, settings, baseline, console)
        runs = tuple(trained.runs)
        if not runs:
            raise _failed(trained)
    elif given := [f"--{key}" for key, value in training_only.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)} say how to train, and nothing is trained without --methods; leave out")
    if not runs:
        raise ConfigError("name runs to compare, or methods to train: moe-replay compare --methods grpo,r3")
    results = [read_results(RunStore(root_of(root), run), extremes=out_ is not None) for run in runs]
    comparison = compare_methods(group_runs(results), baseline)
    if out_ is not None:
        written = write_report(
            results, out_, _TITLE, command_of(command_name(), runs, baseline, str(out_), root), baseline
        ).html
    else:
        written = Path(trained.report) / REPORT_FILE if trained else None
    if json_:
        print(comparison.model_dump_json())
    elif not quiet:
        show_comparison(comparison)
        told = f"wrote {written}, with figures" if written else _next(runs, baseline, root)
        out.print(escape(told), highlight=False, soft_wrap=True)
    elif written is not None:
        print(written)
    if trained and trained.failed:
        raise _failed(trained)


def _failed(trained: "Compared") -> ReplayError:
    return ReplayError(
        f"{len(trained.failed)} of {len(trained.failed) + len(trained.runs)} runs failed and were left out: "
        f"{', '.join(trained.failed)}; see why with moe-replay resume {trained.failed[0]}"
    )


def _settings(config: Path | None, iterations: int | None, set_: list[str] | None, root: str | None) -> RunConfig:
    overrides = dict(parse_override(text) for text in set_ or [])
    for key in overrides:
        if key in _OWN or key.startswith("method."):
            raise ConfigError(
                f"--set {key}: a comparison sets method, seed and tracking.comparison of its runs itself; name presets "
                "in --methods, seeds in --seeds, the comparison in --name, and for a method of your own train its runs "
                "with moe-replay run, then compare them"
            )
    overrides |= {"iterations": iterations} if iterations is not None else {}
    return load_config(config, overrides | ({"storage.root": root} if root is not None else {}))


def _train(
    methods: list[str], seeds: str, name: str | None, config: RunConfig, baseline: str | None, console: Console
) -> "Compared":
    from moe_replay.cli.methods_run import train_methods

    if not re.fullmatch(r"\d+(,\d+)*", seeds):
        raise ConfigError(f"seeds are whole numbers parted by commas, for example --seeds 0,1,2; given: {seeds!r}")
    chosen = [load_config(None, {"method": method}).method for method in methods]
    labels = [method.label for method in chosen]
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"the baseline {baseline!r} is none of the methods to train, {', '.join(labels)}; add it")
    comparison = name or f"compare-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    numbers = [int(seed) for seed in seeds.split(",")]
    # The command as it was given, under the name that was made up for it.
    go_on = shlex.join([command_name(), *sys.argv[1:], *([] if name else ["--name", comparison])])
    return train_methods(config, chosen, numbers, comparison, baseline, console, go_on)


def _next(runs: Sequence[str], baseline: str | None, root: str | None) -> str:
    return f"next:  {command_of(command_name(), runs, baseline, 'report', root)}     (a report with figures)"


def show_comparison(comparison: MethodComparison) -> None:
    """Print a table for each κ, and what it says in sentences."""
    for group, (heading, sentences) in zip(comparison.groups, summary_of(comparison), strict=True):
        out.print(_table(group, heading))
        for line in (*sentences, *group.notes):
            out.print(escape(line), highlight=False, soft_wrap=True)
        out.print()


def _table(group: GroupComparison, heading: str) -> Table:
    table = Table(title=escape(f"{heading}, model {group.model}"), title_justify="left")
    for name in ("measure", "method", "value", "95 % interval", f"against {group.baseline}"):
        table.add_column(escape(name), justify="left" if name in ("measure", "method") else "right")
    for row in group.rows:
        table.add_section()
        for number, cell in enumerate(row.cells):
            words = row.measure if number == 0 else "", cell.method, *_cell(cell, row.unit)
            table.add_row(*(escape(word) for word in words))
    return table


def _cell(cell: Cell, unit: Unit) -> tuple[str, str, str]:
    """Value, interval and verdict."""
    if cell.number is None:
        return "-", "", ""
    interval = cell.number.interval
    bounds = " .. ".join(shown(bound, unit) for bound in interval) if interval is not None else ""
    return shown(cell.number.value, unit), bounds, cell.verdict or ""
