"""The figure of two routing archives compared."""

from pathlib import Path

import numpy as np

from moe_replay.analysis.differences import Comparison
from moe_replay.drawing import layer_ticks, new_figure, save_figure
from moe_replay.errors import ConfigError


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
    agreement_LB = np.array(comparison.bins.agreement, dtype=np.float64)
    num_layers, num_bins = agreement_LB.shape
    lowest = min(float(np.nanmin(agreement_LB)), 0.95)
    figure = new_figure(9.6, min(9.0, max(3.6, 2.4 + 0.13 * num_layers)))
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    extent = (0, num_bins * comparison.bins.tokens_per_bin, num_layers - 0.5, -0.5)
    image = axes.imshow(
        agreement_LB, aspect="auto", extent=extent, cmap="viridis", vmin=lowest, vmax=1, interpolation="none"
    )
    layer_ticks(axes.yaxis, [row.layer for row in comparison.layers])
    axes.set_ylabel("decoder layer")
    per_bin = comparison.bins.tokens_per_bin
    axes.set_xlabel("token position in the sequence" + (f" (bins of {per_bin})" if per_bin > 1 else ""))
    axes.set_title(_title(comparison), fontsize=11, loc="left")
    figure.colorbar(image, ax=axes, label=f"agreement@{comparison.top_k}")
    save_figure(figure, path)


def _title(comparison: Comparison) -> str:
    return (
        f"Routes of {comparison.a} and {comparison.b}\n"
        f"agreement@{comparison.top_k} {comparison.agreement:.4f} over {comparison.compared_rows:,} tokens of "
        f"{comparison.shared_sequences:,} sequences"
    )
