"""Figures as PNG files. matplotlib is imported when one is drawn."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_replay.analysis.differences import Comparison
from moe_replay.archive.storage import file_aside
from moe_replay.errors import ConfigError

FORMAT = "png"
_LABELLED_LAYERS = 16
_DPI = 150


def check_figure(path: Path) -> None:
    """Raise ConfigError unless `path` ends with .png and its folder is there."""
    if path.suffix.lower() != f".{FORMAT}":
        raise ConfigError(f"{path} does not end with .{FORMAT}, and figures are PNG files; name it so")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to draw {path.name} in; make it first")


def draw_agreement(comparison: Comparison, path: Path) -> None:
    """Heat map of a comparison: layers by token position, coloured by agreement.

    The colours span what is there, 0.05 at least, so that small differences can be seen; grey is where neither layer
    nor position has a row that both archives captured. Raises ConfigError when nothing was compared or `path` can't be
    written.
    """
    if comparison.agreement is None:
        raise ConfigError(
            f"{comparison.a} and {comparison.b} share no token that both have routes of, so there is nothing to draw; "
            "compare runs of the same tokens"
        )
    # Without pyplot, which keeps figures alive and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    agreement_LB = np.array(comparison.bins.agreement, dtype=np.float64)
    num_layers, num_bins = agreement_LB.shape
    lowest = min(float(np.nanmin(agreement_LB)), 0.95)
    figure = Figure(figsize=(9.6, min(9.0, max(3.6, 2.4 + 0.13 * num_layers))), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    extent = (0, num_bins * comparison.bins.tokens_per_bin, num_layers - 0.5, -0.5)
    image = axes.imshow(
        agreement_LB, aspect="auto", extent=extent, cmap="viridis", vmin=lowest, vmax=1, interpolation="none"
    )
    step = -(-num_layers // _LABELLED_LAYERS)
    axes.set_yticks(range(0, num_layers, step), [str(row.layer) for row in comparison.layers[::step]])
    axes.set_ylabel("decoder layer")
    per_bin = comparison.bins.tokens_per_bin
    axes.set_xlabel("token position in the sequence" + (f" (bins of {per_bin})" if per_bin > 1 else ""))
    axes.set_title(_title(comparison), fontsize=11, loc="left")
    figure.colorbar(image, ax=axes, label=f"agreement@{comparison.top_k}")
    _save(figure.savefig, path)


def _title(comparison: Comparison) -> str:
    return (
        f"Routes of {comparison.a} and {comparison.b}\n"
        f"agreement@{comparison.top_k} {comparison.agreement:.4f} over {comparison.compared_rows:,} tokens of "
        f"{comparison.shared_sequences:,} sequences"
    )


def _save(save: Callable[..., None], path: Path) -> None:
    try:
        with file_aside(path) as partial:
            save(partial, format=FORMAT)
            os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}); choose another place for the figure") from error
