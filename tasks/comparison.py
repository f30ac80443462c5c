"""The report of a comparison: written beside the runs' home, filed in MLflow, linked in Prefect."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from moe_replay.archive.artifacts import RunStore
from moe_replay.config import RunConfig
from moe_replay.places import home_folder, run_root
from tasks.progress import artifact_key
from tasks.retry import is_transient
from tasks.tracking.steps import file_report


@task(
    name="report comparison", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=is_transient
)
def report_comparison(config: RunConfig, comparison: str, run_ids: list[str], baseline: str | None) -> str:
    """Write the report of the runs, held against the method `baseline`, and return its folder."""
    from moe_replay.reports.comparison import compare_methods
    from moe_replay.reports.groups import group_runs
    from moe_replay.reports.html import command_of, write_report
    from moe_replay.reports.runs import read_results
    from moe_replay.reports.summary import summary_of

    root = run_root(config)
    results = [read_results(RunStore(root, run_id)) for run_id in run_ids]
    folder = home_folder() / "comparisons" / comparison
    command = command_of("moe-replay", run_ids, baseline, comparison, config.storage.root)
    write_report(results, folder, f"Comparison {comparison}", command, baseline)
    compared = compare_methods(group_runs(results), baseline)
    (folder / "comparison.json").write_text(compared.model_dump_json(indent=2))
    file_report(config, comparison, folder)
    _say(comparison, folder, summary_of(compared))
    return str(folder)


def _say(comparison: str, folder: Path, summary: list[tuple[str, list[str]]]) -> None:
    """Show what was found in the Prefect UI."""
    parts = [f"# Comparison {comparison}", f"The whole report, with figures: `{folder / 'report.html'}`"]
    parts += [
        f"## {heading}\n" + "\n".join(f"- {sentence}" for sentence in sentences) for heading, sentences in summary
    ]
    create_markdown_artifact("\n\n".join(parts), key=artifact_key("comparison", comparison))
