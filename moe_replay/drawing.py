"""What all figures of runs share: their size, colours and text, and how they become files.

matplotlib is imported when a figure is made, and without pyplot, which keeps figures alive and looks for a display.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.archive.storage import file_aside
from moe_replay.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMAT = "png"
INK, MUTED, RULE = "#222222", "#6b6b6b", "#d9d9d9"
ONE_RUN = "#0072B2"
"""Colour of the one run of a figure."""
BAND_ALPHA = 0.13
_LONGEST_LABEL = 36
_LABELLED_LAYERS = 16


@dataclass(frozen=True)
class Style:
    """How a method is drawn; told by colour, and by marker or dashes where colours can't be told apart."""

    colour: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


# Okabe and Ito's colours, which most colour-blind people can tell apart.
_OF_PRESETS = {
    "grpo": Style("#5f5f5f", "o", "-"),
    "gspo": Style("#E69F00", "s", (0, (5, 1))),
    "tis": Style("#56B4E9", "^", (0, (3, 1, 1, 1))),
    "r2": Style("#009E73", "D", (0, (4, 2))),
    "r3": Style("#0072B2", "v", "-"),
    "pr2": Style("#D55E00", "P", (0, (6, 1, 1, 1))),
}
_OF_OTHERS = [
    Style("#CC79A7", "X", "-"),
    Style("#8C6D1F", "h", (0, (5, 1))),
    Style("#332288", "<", (0, (3, 1, 1, 1))),
    Style("#44AA99", ">", (0, (4, 2))),
    Style("#882255", "p", "-"),
    Style("#999933", "d", (0, (2, 1))),
]


def styles_of(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each method: fixed for presets, for others in the order of `labels`."""
    others = [label for label in labels if label not in _OF_PRESETS]
    return {label: _OF_PRESETS.get(label) or _OF_OTHERS[others.index(label) % len(_OF_OTHERS)] for label in labels}


def check_figure(path: Path) -> None:
    """Raise ConfigError unless `path` ends with .png and its folder is there."""
    if path.suffix.lower() != f".{FORMAT}":
        raise ConfigError(f"{path} does not end with .{FORMAT}, and figures are PNG files; name it so")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to draw {path.name} in; make it first")


def new_figure(width: float, height: float, dpi: int = 150, arranged: bool = True) -> "Figure":
    """An empty figure of that many inches; `arranged` has matplotlib find the places of panels, which takes a while."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained" if arranged else None, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write the figure whole or not at all; raises ConfigError when `path` can't be written."""
    check_figure(path)
    try:
        with file_aside(path) as partial:
            # Without the version of matplotlib, so that equal results give equal files.
            figure.savefig(partial, format=FORMAT, metadata={"Software": None})
            os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}); choose another place for the figure") from error


def dress(axes: "Axes", title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Titles of a panel, and no more lines than reading it needs."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=MUTED, which="both")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)


def whole_numbers(axes: "Axes", most: int = 9) -> None:
    """Ticks of the x axis at integers alone: iterations, mini-steps, layers; `most` intervals between them."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def layer_ticks(axis: "Axis", layers: Sequence[int]) -> None:
    """Decoder layers under their own indices on an axis that counts MoE layers from 0; of many, every second or so."""
    step = -(-len(layers) // _LABELLED_LAYERS)
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def percent_ticks(axes: "Axes") -> None:
    """The y axis in percent, with as many decimals as its range needs."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))


def logarithmic(axes: "Axes", values: np.ndarray) -> None:
    """A logarithmic y axis down to the least of `values` above 0, below which lines leave the panel; else linear."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=0.7 * positive.min())


def say(axes: "Axes", text: str) -> None:
    """A panel that has nothing to show says why."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9.5, color=MUTED, wrap=True)


def plain(text: str) -> str:
    """Text of a run as matplotlib shows it: no formulas, no label that a legend would leave out, not too long."""
    short = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    return (f" {short}" if short.startswith("_") else short).replace("$", r"\$")


def over_seeds(values_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, least and most over the seeds that have a value, [X] each; NaN where none has."""
    masked_SX = np.ma.masked_invalid(values_SX)
    parts = masked_SX.mean(axis=0), masked_SX.min(axis=0), masked_SX.max(axis=0)
    mean_X, low_X, high_X = (np.ma.filled(part.astype(np.float64), np.nan) for part in parts)
    return mean_X, low_X, high_X
