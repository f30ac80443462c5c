"""Entry point of the command line, and the commands that have no group."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.markup import escape

from moe_replay.cli.console import err
from moe_replay.cli.console import out as console
from moe_replay.environment import make_home, set_defaults
from moe_replay.errors import ConfigError, ReplayError, StabilityAlarm
from moe_replay.servers import MLFLOW_PORT, PREFECT_PORT, serve


class Commands(App):
    """Commands that are imported when they are called; those of a group all when its help is asked for."""

    def help_print(self, tokens: Any = None, **options: Any) -> None:
        """Print the help of what the tokens name."""
        named = self.parse_commands(tokens)[1][-1]
        named.resolved_commands()
        super().help_print(tokens, **options)


app = Commands(
    name="moe-replay",
    help="Reinforcement learning for Mixture-of-Experts models with routing replay.",
    suppress_keyboard_interrupt=False,  # `main` ends what an interrupt leaves
)
archive = App(name="archive", help="Look into routing archives, compare and exchange them, and remove what has served.")
predictor = App(name="predictor", help="Fit evolution predictors again from what a run stored; show what they gain.")
alerts = App(name="alerts", help="Have Prefect tell of runs that fail, crash, stall or become unstable.")
data = App(name="data", help="Make prompt files in verl's schema.")
app.command(archive)
app.command(predictor)
app.command(alerts)
app.command(data)

# By name, so that a command costs no import of the others.
for group, module, names in (
    (app, "training", ("run", "resume")),
    (app, "fork", ("fork",)),
    (app, "status", ("status",)),
    (app, "compare", ("compare",)),
    (app, "evaluate", ("evaluate",)),
    (app, "counterfactual", ("counterfactual",)),
    (app, "dashboard", ("dashboard",)),
    (app, "plan", ("plan",)),
    (archive, "archive", ("inspect", "verify")),
    (archive, "diff", ("diff",)),
    (archive, "load", ("load",)),
    (archive, "exchange", ("export", "import_")),
    (archive, "gc", ("gc",)),
    (predictor, "predictor", ("fit", "report")),
    (alerts, "alerts", ("install",)),
):
    for name in names:
        group.command(f"moe_replay.cli.{module}:{name}", name=name.rstrip("_"))


def main() -> None:
    """Entry point; exits with 2 for what the user has to change, 3 for a decision to take, 1 for what went wrong."""
    set_defaults()
    try:
        app(sys.argv[1:])
    except ReplayError as error:
        err.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, StabilityAlarm) else 1)
    except KeyboardInterrupt:
        # All is closed by now; Prefect's threads would go on sending events to the server that was stopped.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


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
    console.print(escape(told), highlight=False, soft_wrap=True)


@app.command
def ui(*, mlflow_port: int = MLFLOW_PORT, prefect_port: int = PREFECT_PORT) -> None:
    """Start the MLflow UI and the Prefect server on loopback, until interrupted."""
    serve(make_home(), mlflow_port, prefect_port, console)
