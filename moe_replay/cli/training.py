"""`moe-replay run` and `resume`: the training flow in this process, under a live display."""

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from moe_replay.alarm import Action
from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Json, Quiet, Root, command_name, console_for_progress, err, out, root_of
from moe_replay.config import RunConfig, load_config, parse_override
from moe_replay.environment import make_home
from moe_replay.errors import ConfigError, EngineLost
from moe_replay.interrupts import interruptible
from moe_replay.stages.run import as_argument


def run(
    config: Path | None = None,
    *,
    method: str | None = None,
    iterations: int | None = None,
    run_id: str | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    root: Root = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a policy with routing replay.

    Parameters
    ----------
    config
        A TOML file; by default the embedded model and task.
    method
        grpo, gspo, tis, r2, r3 or pr2.
    iterations
        Rollout-and-train cycles.
    run_id
        Name of the run; a name that exists continues that run.
    set_
        A setting as key=value with a dotted key; may be repeated.
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
    _train(settings, run_id, json_, quiet)


def resume(
    run_id: str, *, decide: Action | None = None, root: Root = None, json_: Json = False, quiet: Quiet = False
) -> None:
    """Continue a run at its first stage that is not committed, with the config it was started with.

    Parameters
    ----------
    run_id
        The run.
    decide
        What becomes of the batch that the stability alarm stopped at.
    """
    from moe_replay.preparation import stored_config

    store = RunStore(root_of(root), run_id)
    config = stored_config(store)
    if decide is not None:
        _decide(store, config, decide)
    storage = config.storage.model_copy(update={"root": root})
    _train(config.model_copy(update={"storage": storage}), run_id, json_, quiet)


def _decide(store: RunStore, config: RunConfig, action: Action) -> None:
    from moe_replay.stages.decisions import waiting_batch

    batch = waiting_batch(store)
    if batch is None:
        raise ConfigError(
            f"run {store.run_id} waits for no decision: no batch of it stopped at the stability alarm; resume it "
            "without --decide"
        )
    batch.decide(config, action, "person")


def _train(config: RunConfig, run_id: str, as_json: bool, quiet: bool) -> None:
    """Run the flow in this process, and say what came of it."""
    from moe_replay.preparation import preflight

    # Before Prefect is imported: that takes seconds, and wants to make its home.
    preflight(config, run_id)

    def tell(what: str) -> None:
        err.print(what, highlight=False, markup=False, soft_wrap=True)

    # The display and our own errors tell what Prefect would log here; its own interface still shows every line.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from moe_replay.servers import prefect_server
    from tasks.lease import holding_run

    with holding_run(config, run_id, tell), prefect_server(make_home()) as wait_for_prefect:
        done = _run_flow(config, run_id, console_for_progress(as_json, quiet), wait_for_prefect)
    store = RunStore(done["root"], run_id)
    if as_json:
        from moe_replay.reports.results import iteration_metrics

        print(json.dumps({**done, "iterations": [iteration_metrics(store, n) for n in range(config.iterations)]}))
        return
    if quiet:
        print(run_id)
        return
    named = as_argument(config, run_id)
    out.print(
        f"\nrun       {run_id}\nartifacts {store.name}\nMLflow    run {done['mlflow_run_id']}\n"
        f"\nnext:  {command_name()} status {named}\n       {command_name()} archive inspect {named}\n"
        f"       {command_name()} ui          (MLflow and Prefect in the browser)",
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
    from tasks.reporting import flush_logs, hearing_results
    from tasks.stability import hearing_alarms

    title = f"run {run_id}: method {config.method.label}, {config.iterations} iterations"
    with (
        RunDisplay(console, title) as display,
        listening(display.on_progress),
        hearing_results(display.on_result),
        hearing_alarms(display.on_alarm),
    ):
        try:
            with interruptible():
                ready = prepare(
                    config, run_id, lambda done, total, what: display.on_progress("prepare", done, total, what)
                )
                if not ready.is_complete():
                    engines_of(ready).start()
                display.on_progress("prepare", 0, 0, "starting the engines and Prefect")
                from flows.train import train

                wait_for_prefect()
                try:
                    return train(config, run_id)
                finally:
                    flush_logs()
        except KeyboardInterrupt:
            go_on = f"stopped; what is committed stays: {command_name()} resume {as_argument(config, run_id)}"
            err.print(go_on, highlight=False, markup=False, soft_wrap=True)
            raise
        except TimeoutError as error:
            raise EngineLost(
                f"a stage took longer than stages.timeout_seconds = {config.stages.timeout_seconds:g} in each of "
                f"{config.stages.retries + 1} attempts; raise the limit, then: {command_name()} "
                f"resume {as_argument(config, run_id)}"
            ) from error
