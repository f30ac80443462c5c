"""The training flow in this process, under a live display."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import command_name, console_for_progress, err, out
from moe_replay.config import RunConfig
from moe_replay.display import RunDisplay
from moe_replay.environment import make_home
from moe_replay.errors import EngineLost
from moe_replay.holding import holding_run
from moe_replay.interrupts import interruptible
from moe_replay.places import as_argument
from moe_replay.stages.run import Run


@contextmanager
def holding_from_here(config: RunConfig, run_id: str) -> Iterator[None]:
    """Keep other runners from the run, and say so where that takes a while. Raises RunInUse when one works on it."""

    def tell(what: str) -> None:
        err.print(what, highlight=False, markup=False, soft_wrap=True)

    with holding_run(config, run_id, tell):
        yield


def train_here(config: RunConfig, run_id: str, allow_config_change: list[str], as_json: bool, quiet: bool) -> None:
    """Run the flow, and say what came of it."""
    from moe_replay.preparation import preflight

    # Before Prefect is imported: that takes seconds, and wants to make its home.
    preflight(config, run_id, allow_config_change)
    # The display and our own errors tell what Prefect would log here; its own interface still shows every line.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from moe_replay.servers import prefect_server

    with holding_from_here(config, run_id), prefect_server(make_home()) as wait_for_prefect:
        console = console_for_progress(as_json, quiet)
        done = _run_flow(config, run_id, allow_config_change, console, wait_for_prefect)
    store = RunStore(done["root"], run_id)
    if as_json:
        from moe_replay.plan import RunPlan
        from moe_replay.reports.results import iteration_metrics

        iterations = RunPlan.stored(store).iterations
        results = [iteration_metrics(store, n) for n in iterations]
        print(json.dumps({**done, "first_iteration": iterations.start, "iterations": results}))
        return
    if quiet:
        print(run_id)
        return
    named = as_argument(run_id, config.storage.root)
    out.print(
        f"\nrun       {run_id}\nartifacts {store.name}\nMLflow    run {done['mlflow_run_id']}\n"
        f"\nnext:  {command_name()} status {named}\n       {command_name()} archive inspect {named}\n"
        f"       {command_name()} ui          (MLflow and Prefect in the browser)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _run_flow(
    config: RunConfig,
    run_id: str,
    allow_config_change: list[str],
    console: Console,
    wait_for_prefect: Callable[[], None],
) -> dict[str, str]:
    """Prepare the run and start its engines while Prefect's server starts, then run the flow under a live display."""
    from moe_replay.preparation import prepare
    from tasks.engines import engines_of
    from tasks.progress import listening
    from tasks.reporting import hearing_results
    from tasks.retry import hearing_retries
    from tasks.stability import hearing_alarms

    beside = ", rollouts one step off" if config.rollout.one_step_off else ""
    title = f"run {run_id}: method {config.method.label}{beside}, {config.iterations} iterations"
    with (
        RunDisplay(console, title) as display,
        listening(display.on_progress),
        hearing_results(display.on_result),
        hearing_alarms(display.on_alarm),
        hearing_retries(display.on_retry),
    ):
        try:
            with interruptible():
                ready = prepare(
                    config,
                    run_id,
                    lambda done, total, what: display.on_progress("prepare", done, total, what),
                    allow_config_change,
                )
                if not ready.is_complete():
                    engines_of(ready).start()
                elif done := _done_already(ready, display):
                    return done
                display.on_progress("prepare", 0, 0, "starting the engines and Prefect")
                return _call_flow(config, run_id, allow_config_change, wait_for_prefect)
        except KeyboardInterrupt:
            go_on = (
                f"stopped; what is committed stays: {command_name()} resume {as_argument(run_id, config.storage.root)}"
            )
            err.print(go_on, highlight=False, markup=False, soft_wrap=True)
            raise


def _call_flow(
    config: RunConfig, run_id: str, allow_config_change: list[str], wait_for_prefect: Callable[[], None]
) -> dict[str, str]:
    from flows.train import train
    from tasks.reporting import flush_logs

    wait_for_prefect()
    try:
        return train(config, run_id, allow_config_change)
    except TimeoutError as error:
        raise EngineLost(
            f"a stage took longer than stages.timeout_seconds = {config.stages.timeout_seconds:g} in each of "
            f"{config.stages.retries + 1} attempts; raise the limit, then: {command_name()} "
            f"resume {as_argument(run_id, config.storage.root)}"
        ) from error
    finally:
        flush_logs()


def _done_already(run: Run, display: RunDisplay) -> dict[str, str] | None:
    """Show what a complete run achieved, where MLflow has all of it too; none where the flow has to see to that."""
    from moe_replay.reports.results import iteration_metrics
    from tasks.tracking.steps import finished_run

    if (tracked := finished_run(run)) is None:
        return None
    for n in run.plan.iterations:
        display.on_result(run.run_id, n, iteration_metrics(run.store(), n))
    return {"run_id": run.run_id, "root": run.root, "mlflow_run_id": tracked}
