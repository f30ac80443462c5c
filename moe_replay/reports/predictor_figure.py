"""A fit of predictors as a PNG file: what it gains by layer. matplotlib is imported when one is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe_replay.drawing import INK, MUTED, ONE_RUN, dress, layer_ticks, new_figure, plain, save_figure
from moe_replay.errors import ConfigError
from moe_replay.reports.predictor_report import LayerReport, PredictorReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_USED, _UNUSED = ONE_RUN, MUTED


def draw_predictor(report: PredictorReport, path: Path) -> None:
    """By layer: agreement gained, KL against that of the zero predictor, and the factor chosen.

    Bars are one standard error; a layer that keeps zero is grey and shows the factor of least KL. Raises ConfigError
    when no fit was judged or `path` can't be written.
    """
    layers = [layer for layer in report.layers if layer.shown is not None]
    if not layers:
        raise ConfigError(
            f"the fit of run {report.run_id}, iteration {report.iteration}, has no evidence to draw: no earlier fit "
            "was there to be judged; take a later iteration, or judge on prompts left out (predictor.judged_on)"
        )
    figure = new_figure(max(6.8, min(14.0, 4.0 + 0.22 * len(layers))), 7.2)
    gain, ratio, factor = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    _draw_gain(gain, layers, report.top_k)
    _draw_ratio(ratio, layers)
    factor.bar(range(len(layers)), [layer.factor for layer in layers], width=min(0.6, 0.08 * len(layers)), color=_USED)
    factor.set(xlim=(-0.7, len(layers) - 0.3), ylim=(0, 1.05))
    dress(factor, xlabel="decoder layer", ylabel="factor of W_p")
    layer_ticks(factor.xaxis, [layer.layer for layer in layers])
    figure.suptitle(_title(report), fontsize=10, x=0.01, ha="left", color=INK)
    save_figure(figure, path)


def _draw_gain(axes: "Axes", layers: list[LayerReport], top_k: int) -> None:
    for place, layer in enumerate(layers):
        if one := layer.shown:
            _point(axes, place, layer, 100 * one.agreement_change, 100 * (one.agreement_change_error or 0))
    axes.axhline(0, color=INK, linewidth=0.8)
    dress(axes, ylabel=f"agreement@{top_k} gained\n(percentage points)")


def _draw_ratio(axes: "Axes", layers: list[LayerReport]) -> None:
    for place, layer in enumerate(layers):
        zero = layer.judged.kl_zero
        if (one := layer.shown) and zero:
            _point(axes, place, layer, one.kl / zero, (one.kl_change_error or 0) / zero)
    axes.axhline(1, color=INK, linewidth=0.8)
    dress(axes, ylabel="KL over that of\nthe zero predictor")


def _point(axes: "Axes", place: int, layer: LayerReport, value: float, error: float) -> None:
    color = _USED if layer.factor else _UNUSED
    axes.errorbar(place, value, yerr=error, fmt="o", color=color, markersize=5, capsize=2.5, linewidth=1)


def _title(report: PredictorReport) -> str:
    judged = report.layers[0].judged
    kind = "earlier fits, each on the next iteration" if report.judged_on == "next_iteration" else "on prompts left out"
    return (
        f"Predictors of {plain(report.run_id)}, iteration {report.iteration} ({report.objective}): "
        f"{report.layers_used} of {len(report.layers)} layers used\n"
        f"judged: {kind}; {judged.tokens:,} tokens of {judged.groups} prompts; grey: keeps zero"
    )
