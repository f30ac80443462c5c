"""The figure of a load study: which experts are loaded, and what each placement makes of it."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.analysis.load import LoadStudy, PlacementImbalance
from moe_replay.drawing import layer_ticks, new_figure, plain, save_figure

PLACEMENT_TITLES = {
    "linear": "consecutive experts",
    "round_robin": "round robin",
    "previous": "plan of the previous iteration",
    "static": "plan of this iteration",
    "micro_batch": "plan of each micro-batch",
}
"""Placements as people read them."""


def placement_title(found: PlacementImbalance, num_experts: int) -> str:
    """A placement as people read it, with its replicas."""
    replicas = found.slots - num_experts
    return PLACEMENT_TITLES[found.placement] + (f", {replicas} replicas" if replicas else "")


def draw_loads(study: LoadStudy, path: Path) -> None:
    """Heat map, layers by experts, of load over the layer's mean, and a bar of imbalance for each placement.

    Raises ConfigError when `path` can't be written.
    """
    height = min(9.0, max(4.0, 2.4 + 0.13 * len(study.layers), 1.6 + 0.35 * len(study.placements)))
    figure = new_figure(12.8, height)
    loads, bars = figure.subplots(1, 2, width_ratios=(1.3, 1))
    _draw_heat(figure, loads, study)
    _draw_bars(bars, study)
    figure.suptitle(
        f"Expert load of run {plain(study.run_id)}, iteration {study.iteration}: {study.tokens:,} tokens, "
        f"top-{study.top_k} of {study.num_experts} experts",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    save_figure(figure, path)


def _draw_heat(figure: Any, axes: Any, study: LoadStudy) -> None:
    load_LE = np.array(study.load_LE, dtype=np.float64)
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    image = axes.imshow(relative_LE, aspect="auto", cmap="viridis", vmin=0, interpolation="none")
    layer_ticks(axes.yaxis, study.layers)
    axes.set_ylabel("decoder layer")
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="load over the layer's mean expert")


def _draw_bars(axes: Any, study: LoadStudy) -> None:
    names = [placement_title(found, study.num_experts) for found in study.placements]
    # What exceeds 1 is waiting; bars from 1 on show it to scale.
    excess = [found.imbalance - 1 for found in study.placements]
    colours = ["0.6" if found.placement in ("linear", "round_robin") else "C0" for found in study.placements]
    drawn = axes.barh(names, excess, left=1, color=colours)
    axes.bar_label(drawn, [f"{found.imbalance:.3f}" for found in study.placements], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(1, 1 + 1.2 * max([*excess, 0.01]))
    axes.set_xlabel("most loaded device over the mean")
    axes.set_title(
        f"{study.devices} devices, {study.micro_batches:,} micro-batches of up to {study.micro_batch_tokens:,} tokens",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
