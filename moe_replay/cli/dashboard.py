"""`moe-replay dashboard`: a run in one figure."""

from pathlib import Path

from rich.markup import escape

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Root, out, root_of
from moe_replay.drawing import check_figure
from moe_replay.reports.dashboard import draw_dashboard
from moe_replay.reports.layers import draw_layers
from moe_replay.reports.runs import read_results


def dashboard(run_id: str, figure: Path, *, layers: Path | None = None, root: Root = None) -> None:
    """Draw a run, finished or not: mismatch, agreement, predictor, policy health, reward and evaluation.

    Parameters
    ----------
    run_id
        The run.
    figure
        The PNG file to draw.
    layers
        Also draw heat maps, layers by iteration, to this PNG file.
    """
    for path in (figure, layers):
        if path is not None:
            check_figure(path)
    results = read_results(RunStore(root_of(root), run_id), extremes=False)
    draw_dashboard(results, figure)
    drawn = [figure]
    if layers is not None:
        draw_layers(results, layers)
        drawn.append(layers)
    told = f"drew {' and '.join(map(str, drawn))} of {len(results.iterations)} iterations"
    left_out = f"; iterations not completed: {', '.join(map(str, results.incomplete))}" if results.incomplete else ""
    out.print(escape(told + left_out), highlight=False, soft_wrap=True)
