"""Results as they come: to whoever listens in this process, to the log, and as artifacts to the Prefect UI."""

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging.handlers import APILogHandler

from moe_replay.archive.layout import STAGES
from moe_replay.places import as_argument
from moe_replay.stages.run import Run
from tasks.listeners import Listeners
from tasks.progress import artifact_key
from tasks.tracking.server import run_page

HEADLINES = ("reward/mean", "mismatch/kl_k3", "mismatch/extreme_fraction", "routing/agreement")
"""The metrics that tell at a glance how a run fares; evaluation's are added."""
_ROWS = 50
"""Newest iterations that artifacts show: Prefect keeps each version of them, and MLflow has all."""

_results = Listeners[[str, int, dict[str, float]]]()
hearing_results = _results.hearing
"""Has a listener called with (run id, iteration, its metrics) when an iteration ends in this process."""


def headlines(metrics: dict[str, float]) -> dict[str, float]:
    """What a table shows of an iteration."""
    names = [*HEADLINES, *sorted(name for name in metrics if name.startswith("eval/"))]
    return {name: metrics[name] for name in names if name in metrics}


@task(name="report", cache_policy=NO_CACHE)
def report_results(run: Run, results: dict[int, dict[str, float]], mlflow_run_id: str) -> None:
    """Tell listeners and the log of the newest iteration, and refresh the run's two artifacts in the Prefect UI."""
    newest = max(results)
    _results.tell(run.run_id, newest, results[newest])
    told = ", ".join(f"{name} {value:.4g}" for name, value in headlines(results[newest]).items())
    get_run_logger().info("iteration %d: %s", newest, told)
    shown = list(results.items())[-_ROWS:]
    rows = [{"iteration": n, **headlines(result)} for n, result in shown]
    description = f"Run `{run.run_id}`, method {run.config.method.label}"
    try:
        create_table_artifact(table=rows, key=artifact_key("results", run.run_id), description=description)
        overview = _overview(run, dict(shown), run_page(run.home, mlflow_run_id))
        create_markdown_artifact(overview, key=artifact_key("run", run.run_id), description=description)
    except Exception as error:
        get_run_logger().warning("the artifacts of the run could not be refreshed (%s)", type(error).__name__)


def _overview(run: Run, results: dict[int, dict[str, float]], mlflow_page: str) -> str:
    """Where to find what of the run, and how long each stage took, as Markdown."""
    config, name = run.config, as_argument(run.run_id, run.config.storage.root)
    return f"""# Run {run.run_id}

Method {config.method.label}, κ = {config.training.mini_steps}, seed {config.seed}; \
{max(results) + 1} of {config.iterations} iterations are done.

- MLflow: [metrics, charts, checkpoints]({mlflow_page})
- Artifacts: `{run.store().name}`
- Look with `moe-replay status {name}`, go on with `moe-replay resume {name}`

## Seconds per stage

{_durations(results)}
"""


def _durations(results: dict[int, dict[str, float]]) -> str:
    stages = [stage for stage in STAGES if any(f"time/{stage}" in metrics for metrics in results.values())]
    lines = [f"| iteration | {' | '.join(stages)} | total |", "|--:" * (len(stages) + 2) + "|"]
    for iteration, metrics in results.items():
        seconds = [metrics.get(f"time/{stage}") for stage in stages]
        cells = ["-" if one is None else f"{one:.2f}" for one in seconds]
        lines.append(f"| {iteration} | {' | '.join(cells)} | {sum(one or 0.0 for one in seconds):.2f} |")
    return "\n".join(lines)


def flush_logs() -> None:
    """Hand what was logged to Prefect's server, as long as there is one; it is sent every other second otherwise."""
    APILogHandler().flush()
