"""`moe-replay evaluate`: the evaluation flow in this process, for any checkpoint or a model as it is."""

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from moe_replay.cli.console import (
    Json,
    Quiet,
    Root,
    command_name,
    console_for_progress,
    out,
    run_and_iteration,
)
from moe_replay.cli.running import holding_from_here
from moe_replay.config import RunConfig
from moe_replay.config_reading import document_with, parse_as, parse_override
from moe_replay.environment import make_home
from moe_replay.errors import ConfigError
from moe_replay.interrupts import interrupts_kept
from moe_replay.places import as_argument

if TYPE_CHECKING:
    from flows.evaluate import Evaluated
    from moe_replay.evaluations import EvaluationRequest


def evaluate(
    run: str | None = None,
    *,
    model: str | None = None,
    id_: Annotated[str | None, Parameter(name="--id")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    root: Root = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a checkpoint on benchmarks, with settings of its own.

    The checkpoints of one run under the same settings are one evaluation, whose scores are one line in MLflow. A
    checkpoint that was scored before is not scored again.

    Parameters
    ----------
    run
        A run, or RUN@ITERATION; by default its newest checkpoint.
    model
        A model to evaluate as it is, in place of a run's checkpoint.
    id_
        Name of the evaluation; by default made of the run and the settings.
    set_
        A setting as key=value with a dotted key, for example evaluation.samples=32; may be repeated. The run's own
        settings hold where none is given.
    """
    from moe_replay.evaluations import EvaluationRequest

    if (run is None) == (model is None):
        raise ConfigError("name a run, RUN@ITERATION, or with --model a model to evaluate as it is; one of them")
    overrides: dict[str, Any] = dict(parse_override(text) for text in set_ or [])
    if run is not None:
        overrides["run_id"], overrides["iteration"] = run_and_iteration(run)
    else:
        overrides["model.path"] = model
    if root is not None:
        overrides["storage.root"] = root
    done = _run_flow(parse_as(EvaluationRequest, document_with(overrides)), id_, quiet)
    if json_:
        print(json.dumps(done._asdict()))
    elif quiet:
        print(done.evaluation_id)
    else:
        _show(done, root)


def _run_flow(request: "EvaluationRequest", evaluation_id: str | None, quiet: bool) -> "Evaluated":
    """Run the flow in this process, showing on standard error what it is at, unless `quiet`."""
    from moe_replay.evaluations import check_evaluation

    # Before Prefect is imported: that takes seconds, and wants to make its home.
    own_id = check_evaluation(request, evaluation_id)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from moe_replay.servers import prefect_server

    with (
        holding_from_here(RunConfig(storage=request.storage), own_id),
        prefect_server(make_home()) as wait_for_prefect,
        console_for_progress(as_json=True, quiet=quiet).status("starting Prefect") as status,
    ):
        from flows.evaluate import evaluate as evaluation_flow
        from tasks.progress import listening
        from tasks.reporting import flush_logs

        def show(stage: str, done: int, total: int, what: str) -> None:
            status.update(escape(f"{stage}: {done} of {total} {what}" if total else f"{stage}: {what}"))

        with listening(show):
            wait_for_prefect()
            status.update("starting the engine")
            try:
                with interrupts_kept():
                    return evaluation_flow(request, evaluation_id)
            finally:
                flush_logs()


def _show(done: "Evaluated", root: str | None) -> None:
    table = Table(title=escape(f"scores of {done.checkpoint}"), title_justify="left")
    table.add_column("benchmark")
    table.add_column("avg@n", justify="right")
    table.add_column("pass@n", justify="right")
    for name in sorted({key.split("/")[1] for key in done.scores}):
        average, solved = (done.scores[f"eval/{name}/{kind}"] for kind in ("avg_at_n", "pass_at_n"))
        table.add_row(escape(name), f"{average:.4f}", f"{solved:.4f}")
    out.print(table)
    if done.already_committed:
        out.print("this checkpoint was evaluated before under these settings; nothing was to be done")
    out.print(
        f"\nevaluation {done.evaluation_id}\nMLflow     run {done.mlflow_run_id}\n"
        f"\nnext:  {command_name()} status {as_argument(done.evaluation_id, root)}\n"
        f"       {command_name()} ui          (MLflow and Prefect in the browser)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
