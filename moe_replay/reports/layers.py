"""What differs from layer to layer: a table for one iteration, heat maps for a run.

Legend of shapes: M maps, L MoE layers, N iterations, P mini-steps, D bins of deviation.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.drawing import INK, MUTED, layer_ticks, new_figure, plain, save_figure, whole_numbers
from moe_replay.errors import ConfigError
from moe_replay.reports.runs import RunResults
from moe_replay.reports.series import DEVIATIONS, imbalances
from moe_replay.routing.statistics import RoutingStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAPS = {
    "router_fraction": "Routers that differ, rollout and trainer",
    "agreement_last": "Agreement with the reference at the last mini-step",
    "coverage_gap": "Coverage gap",
    "load_imbalance": "Load imbalance in the rollout: busiest expert over mean",
}
"""Columns of the table that are drawn, with their titles."""


def layer_table(statistics: RoutingStatistics) -> list[dict[str, float | int]]:
    """One row for each MoE layer, all with the same columns; shares are 0..1, means are over mini-steps.

    `coverage_gap` is left out where the routers do not tell it.
    """
    steps = statistics.mini_steps
    imbalance = imbalances(statistics)
    rows = []
    for index, layer in enumerate(statistics.layers):
        row: dict[str, float | int] = {"layer": layer, "router_fraction": statistics.router_fraction_L[index]}
        if steps:
            row |= {
                "agreement": float(np.mean([step.agreement_L[index] for step in steps])),
                "agreement_first": steps[0].agreement_L[index],
                "agreement_last": steps[-1].agreement_L[index],
            }
            gaps = [step.coverage_gap_L[index] for step in steps if step.coverage_gap_L]
            row |= {"coverage_gap": float(np.mean(gaps))} if gaps else {}
            shares_D = np.mean([step.deviation_LD[index] for step in steps], axis=0)
            row |= {f"deviation_{name}": float(share) for name, share in zip(DEVIATIONS, shares_D, strict=True)}
        rows.append({**row, "load_imbalance": float(imbalance[index])})
    return rows


def draw_layers(results: RunResults, path: Path) -> None:
    """Heat maps of a run, layers by iteration, to a PNG file; grey is where nothing is stored.

    Raises ConfigError when no iteration has statistics by layer, or `path` can't be written.
    """
    stored = [part.routing for part in results.iterations if part.routing is not None]
    if not stored:
        raise ConfigError(
            f"run {results.run_id} stores no statistics by layer (removed by retention, or written by an older "
            "version), so there is nothing to draw; its dashboard needs none"
        )
    layers = stored[-1].layers
    maps_MLN = _maps_MLN(results)
    height = min(14.0, max(5.6, 2.6 + 0.3 * len(layers)))
    figure = new_figure(12, height, 110)
    iterations = [part.iteration for part in results.iterations]
    for axes, values_LN, title in zip(figure.subplots(2, 2).flat, maps_MLN, _MAPS.values(), strict=True):
        _draw_map(figure, axes, values_LN, title, layers, iterations)
    told = f"{plain(results.run_id)}   ·   {plain(results.method)}   ·   by layer"
    figure.suptitle(told, x=0.01, ha="left", fontsize=12, color=INK)
    save_figure(figure, path)


def _maps_MLN(results: RunResults) -> np.ndarray:  # noqa: N802
    """The columns to draw, for all iterations from the first to the last; NaN where one is not stored."""
    first, last = results.iterations[0].iteration, results.iterations[-1].iteration
    num_layers = max(len(part.routing.layers) for part in results.iterations if part.routing is not None)
    maps_MLN = np.full((len(_MAPS), num_layers, last - first + 1), np.nan)
    for part in results.iterations:
        if part.routing is not None:
            rows = layer_table(part.routing)
            maps_MLN[:, :, part.iteration - first] = [[row.get(name, np.nan) for row in rows] for name in _MAPS]
    return maps_MLN


def _draw_map(
    figure: "Figure",
    axes: "Axes",
    values_LN: np.ndarray,
    title: str,
    layers: tuple[int, ...],
    iterations: list[int],
) -> None:
    num_layers = len(layers)
    extent = (iterations[0] - 0.5, iterations[-1] + 0.5, num_layers - 0.5, -0.5)
    axes.set_facecolor("0.85")
    image = axes.imshow(values_LN, aspect="auto", extent=extent, cmap="viridis", interpolation="none")
    layer_ticks(axes.yaxis, layers)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylabel("decoder layer", fontsize=9)
    axes.set_xlabel("iteration", fontsize=9)
    axes.tick_params(labelsize=8.5, colors=MUTED)
    whole_numbers(axes)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(labelsize=8)
