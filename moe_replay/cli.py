"""The command line, `moe-replay`. Heavy packages are imported by the commands that need them."""

import json
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import STAGES
from moe_replay.archive.routes import RouteArchive, verify_routes
from moe_replay.config import RunConfig, load_config, parse_config, parse_override, run_root
from moe_replay.environment import make_home, set_defaults
from moe_replay.errors import ConfigError, EngineLost, ReplayError

app = App(name="moe-replay", help="Reinforcement learning for Mixture-of-Experts models with routing replay.")
archive = App(name="archive", help="Look at the routing archive of a run.")
data = App(name="data", help="Make prompt files in verl's schema.")
app.command(archive)
app.command(data)

Json = Annotated[bool, Parameter(name="--json", negative="")]
Root = Annotated[str | None, Parameter(name="--root")]

_out = Console()
_err = Console(stderr=True)


def main() -> None:
    """Entry point; exits with 2 for what the user has to change, 1 for what went wrong on the way."""
    set_defaults()
    try:
        app()
    except ConfigError as error:
        _err.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except ReplayError as error:
        _err.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        # All is closed by now; Prefect's threads would go on sending events to the server that was stopped.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


@app.command
def run(
    config: Path | None = None,
    *,
    method: str | None = None,
    iterations: int | None = None,
    run_id: str | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Train a policy with routing replay.

    Parameters
    ----------
    config
        A TOML file; by default the embedded model and task.
    method
        grpo, gspo, tis, r2 or r3.
    iterations
        Rollout-and-train cycles.
    run_id
        Name of the run; a name that exists continues that run.
    set_
        A setting as key=value with a dotted key; may be repeated.
    root
        fsspec URL under which runs lie.
    json_
        Print one JSON object and nothing else.
    """
    overrides: dict[str, Any] = {}
    if method is not None:
        overrides["method"] = method
    if iterations is not None:
        overrides["iterations"] = iterations
    overrides |= dict(parse_override(text) for text in set_ or [])
    if root is not None:
        overrides["storage.root"] = root
    settings = load_config(config, overrides)
    if run_id is None:
        run_id = f"{settings.method.name}-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    _train(settings, run_id, json_)


@app.command
def resume(run_id: str, *, root: Root = None, json_: Json = False) -> None:
    """Continue a run at its first stage that is not committed, with the config it was started with."""
    from moe_replay.preparation import stored_config

    config = stored_config(RunStore(_root(root), run_id))
    storage = config.storage.model_copy(update={"root": root})
    _train(config.model_copy(update={"storage": storage}), run_id, json_)


@app.command
def status(run_id: str, *, root: Root = None, json_: Json = False) -> None:
    """Show which stages of each iteration are committed, from storage alone."""
    store = RunStore(_root(root), run_id)
    store.read_run()
    stages = [stage for iteration in store.iterations() for stage in store.status(iteration)]
    stages = [stage for stage in stages if stage.stage != "predictor"]
    if json_:
        rows = [
            {"iteration": s.iteration, "stage": s.stage, "state": s.state, "bytes": s.bytes, "seconds": s.seconds}
            for s in stages
        ]
        print(json.dumps({"run_id": run_id, "root": _root(root), "stages": rows}))
        return
    table = Table(title=f"run {run_id}", title_justify="left")
    for heading in ("iteration", "stage", "state", "bytes", "seconds"):
        table.add_column(heading, justify="left" if heading in ("stage", "state") else "right")
    for s in stages:
        seconds = "-" if s.seconds is None else f"{s.seconds:.2f}"
        table.add_row(str(s.iteration), s.stage, s.state, f"{s.bytes:,}" if s.bytes else "-", seconds)
    _out.print(table)


@archive.command
def inspect(run_id: str, *, iteration: int | None = None, root: Root = None, json_: Json = False) -> None:
    """Show what the routing archive of an iteration (by default the last) holds, and where it comes from."""
    summary = _open_archive(RunStore(_root(root), run_id), iteration).summary().model_dump(mode="json")
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
    _out.print(table)


@archive.command
def verify(run_id: str, *, root: Root = None, json_: Json = False) -> None:
    """Re-read every object of a run and check checksums and invariants; exit code 1 when something is wrong."""
    store = RunStore(_root(root), run_id)
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
            _out.print(f"[red]wrong[/]: {escape(problem)}", highlight=False, soft_wrap=True)
    else:
        _out.print(f"all {checked} artifacts of run {run_id} are as committed")
    if problems:
        sys.exit(1)


@data.command(name="reasoning-gym")
def reasoning_gym(task: str, out: Path, *, size: int = 512, seed: int = 0) -> None:
    """Write problems of a reasoning-gym task as a Parquet file in verl's schema.

    Parameters
    ----------
    task
        Name of the task, for example chain_sum.
    out
        The file to write.
    size
        Number of problems.
    seed
        Seed of the generator; use another one for a benchmark.
    """
    from moe_replay.data.reasoning import write_parquet

    # Packages that reasoning-gym needs are compiled on first import, and the compiler complains of their style.
    warnings.simplefilter("ignore", SyntaxWarning)
    write_parquet(task, out, size, seed)
    told = f"wrote {size} problems of {task} to {out}; train on them with --set data.train={out}"
    _out.print(escape(told), highlight=False, soft_wrap=True)


@app.command
def ui(*, mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Start the MLflow UI and the Prefect server on loopback, until interrupted."""
    from moe_replay.servers import serve

    serve(make_home(), mlflow_port, prefect_port, _out)


def _train(config: RunConfig, run_id: str, as_json: bool) -> None:
    """Run the flow in this process, showing progress on standard error when standard output is for a program."""
    from moe_replay.preparation import preflight

    # Before Prefect is imported: that takes seconds, and wants to make its home.
    preflight(config, run_id)
    # The display and our own errors tell what Prefect would log here; its own interface still shows every line.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from moe_replay.servers import prefect_server

    with prefect_server(make_home()) as wait_for_prefect:
        done = _run_flow(config, run_id, _err if as_json else _out, wait_for_prefect)
    store = RunStore(done["root"], run_id)
    if as_json:
        from moe_replay.stages.results import iteration_metrics

        print(json.dumps({**done, "iterations": [iteration_metrics(store, n) for n in range(config.iterations)]}))
        return
    named = f"{run_id} --root {config.storage.root}" if config.storage.root else run_id
    _out.print(
        f"\nrun       {run_id}\nartifacts {store.name}\nMLflow    run {done['mlflow_run_id']}\n"
        f"\nnext:  {_command()} status {named}\n       {_command()} archive inspect {named}\n"
        f"       {_command()} ui          (MLflow and Prefect in the browser)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _run_flow(config: RunConfig, run_id: str, console: Console, wait_for_prefect: Callable[[], None]) -> dict[str, str]:
    """Prepare the run and start its engines while Prefect's server starts, then run the flow under a live display."""
    from moe_replay.display import RunDisplay
    from moe_replay.preparation import prepare
    from tasks.engines import engines_of
    from tasks.progress import listening
    from tasks.reporting import hearing_results

    title = f"run {run_id}: method {config.method.label}, {config.iterations} iterations"
    with RunDisplay(console, title) as display, listening(display.on_progress), hearing_results(display.on_result):
        try:
            ready = prepare(config, run_id, lambda done, total, what: display.on_progress("prepare", done, total, what))
            if not ready.is_complete():
                engines_of(ready).start()
            display.on_progress("prepare", 0, 0, "starting the engines and Prefect")
            from flows.train import train

            wait_for_prefect()
            return train(config, run_id)
        except KeyboardInterrupt:
            _err.print(f"stopped; what is committed stays: {_command()} resume {run_id}", highlight=False)
            raise
        except TimeoutError as error:
            raise EngineLost(
                f"a stage took longer than stages.timeout_seconds = {config.stages.timeout_seconds:g} in each of "
                f"{config.stages.retries + 1} attempts; raise the limit, then: {_command()} resume {run_id}"
            ) from error


def _command() -> str:
    """How this command is called here: by its name where that is on the PATH, else by its path."""
    called = Path(sys.argv[0])
    return called.name if shutil.which(called.name) == str(called.absolute()) else os.path.relpath(called)


def _root(root: str | None) -> str:
    return run_root(parse_config({"storage": {"root": root}}))


def _open_archive(store: RunStore, iteration: int | None) -> RouteArchive:
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
