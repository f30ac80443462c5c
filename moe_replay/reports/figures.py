"""The papers' figures, remade for a group of runs: one line for each method, seeds as a band from least to most.

Legend of shapes: S seeds, N iterations, P mini-steps, B thresholds or numbers of layers, D bins of deviation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.drawing import (
    BAND_ALPHA,
    INK,
    MUTED,
    Style,
    dress,
    logarithmic,
    new_figure,
    over_seeds,
    percent_ticks,
    plain,
    save_figure,
    say,
    styles_of,
    whole_numbers,
)
from moe_replay.reports import series
from moe_replay.reports.extremes import THRESHOLDS_B
from moe_replay.reports.groups import MethodRuns, RunGroup
from moe_replay.reports.measures import metric
from moe_replay.reports.runs import RunResults
from moe_replay.routing.statistics import EXTREME_RATIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 7.2, 4.1
_THRESHOLD_TICKS = (1.001, 1.003, 1.01, 1.03, 1.1, 1.3, 2, 3, 5, 10, 30, 100)
_MINI_STEP = "mini-step"
_MOST_SIDE_BY_SIDE = 9


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the report."""

    name: str
    """Part of its file's name."""
    caption: str
    """What it shows and how to read it."""
    draw: Callable[["Figure", RunGroup], None]


def draw_figure(wanted: ReportFigure, group: RunGroup, path: Path) -> None:
    """Draw one of `FIGURES` to a PNG file; raises ConfigError when it can't be written."""
    figure = new_figure(_WIDTH, _HEIGHT)
    wanted.draw(figure, group)
    save_figure(figure, path)


def _kl_by_step(figure: "Figure", group: RunGroup) -> None:
    axes = figure.add_subplot()
    values = partial(series.by_iteration, value=metric("mismatch/kl_k3"))
    _lines(axes, group, np.array(group.iterations), values)
    logarithmic(axes, _all_values(group, values))
    dress(axes, "Mismatch between rollout and trainer", "iteration", "KL(k3)")
    whole_numbers(axes)
    _legend(figure, axes)


def _extremes_by_threshold(figure: "Figure", group: RunGroup) -> None:
    axes = figure.add_subplot()
    beyond_B = THRESHOLDS_B - 1
    _lines(axes, group, beyond_B, series.extreme_shares)
    shares = _all_values(group, series.extreme_shares)
    axes.set_xscale("log")
    logarithmic(axes, shares)
    has_tokens_B = (shares.reshape(-1, len(beyond_B)) > 0).any(axis=0)
    axes.set_xlim(beyond_B[0], max([EXTREME_RATIO - 1, *beyond_B[has_tokens_B]]) * 1.3)
    axes.axvline(EXTREME_RATIO - 1, color=MUTED, linewidth=0.8, linestyle=":")
    told = r"threshold τ of the ratio of probabilities, $\pi_{old}/\mu$ or $\mu/\pi_{old}$"
    dress(axes, "Extreme tokens", told, "share of tokens above, F(τ)")
    ticks = [tick for tick in _THRESHOLD_TICKS if beyond_B[0] <= tick - 1 <= axes.get_xlim()[1]]
    axes.set_xticks([tick - 1 for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    _legend(figure, axes)


def _differing_routers(figure: "Figure", group: RunGroup) -> None:
    axes = figure.add_subplot()
    numbers = max(len(series.differing_layers(run)) for run in group.runs)
    if numbers <= _MOST_SIDE_BY_SIDE:
        _points(axes, group, series.differing_layers)
    else:
        _lines(axes, group, np.arange(numbers), series.differing_layers)
    logarithmic(axes, _all_values(group, series.differing_layers))
    dress(axes, "Tokens whose experts differ, rollout and trainer", "layers that differ in a token", "share of tokens")
    whole_numbers(axes)
    _legend(figure, axes)


def _agreement_by_mini_step(figure: "Figure", group: RunGroup) -> None:
    title = "Agreement of the live routers with the reference"
    _by_mini_step(figure, group, series.agreement_by_mini_step, title, "experts in common")


def _by_mini_step(
    figure: "Figure", group: RunGroup, values: Callable[[RunResults], np.ndarray], title: str, what: str
) -> None:
    """A share by mini-step, a line a method."""
    axes = figure.add_subplot()
    _lines(axes, group, np.arange(1, group.mini_steps + 1), values, marked=True)
    dress(axes, title, _MINI_STEP, what)
    percent_ticks(axes)
    whole_numbers(axes)
    _legend(figure, axes)


def _deviation(figure: "Figure", group: RunGroup) -> None:
    axes = figure.add_subplot()
    _points(axes, group, _changed)
    logarithmic(axes, _all_values(group, _changed))
    dress(axes, "Deviation of the live routers from the reference", "experts that differ", "share of (token, layer)")
    axes.set_xticks([0, 1, 2], ["1", "2", "3 or more"])
    unchanged = [over_seeds(_stacked(method, series.deviations))[0][0] for method in group.methods]
    told = {plain(label): f"(none: {share:.2%})" for label, share in zip(group.labels, unchanged, strict=True)}
    _legend(figure, axes, told)


def _changed(run: RunResults) -> np.ndarray:
    """Deviations but for none, [D - 1]."""
    return series.deviations(run)[1:]


def _coverage_gap(figure: "Figure", group: RunGroup) -> None:
    title = "Coverage gap of the reference's experts"
    _by_mini_step(figure, group, series.coverage_gap_by_mini_step, title, "gate mass outside the reference")


def _training_dynamics(figure: "Figure", group: RunGroup) -> None:
    """A column for each method, since lines this noisy can't be told apart in one panel."""
    rows = {
        "reward": metric("reward/mean"),
        "entropy": metric("policy/entropy"),
        "gradient norm": metric("policy/grad_norm"),
        "tokens clipped": _clipped,
    }
    figure.set_size_inches(max(_WIDTH, 0.8 + 1.55 * len(group.methods)), 6.4)
    grid = figure.subplots(len(rows), len(group.methods), sharex=True, sharey="row", squeeze=False)
    for panels, (name, value) in zip(grid, rows.items(), strict=True):
        values = partial(series.by_iteration, value=value)
        first_N = over_seeds(_stacked(group.methods[0], values))[0]
        for axes, (method, style) in zip(panels, _styled(group), strict=True):
            axes.plot(group.iterations, first_N, color=MUTED, linewidth=0.9, alpha=0.7)
            _line(axes, np.array(group.iterations), _stacked(method, values), style, plain(method.label))
            dress(axes, ylabel=name if axes is panels[0] else "")
    for axes, label in zip(grid[0], group.labels, strict=True):
        axes.set_title(plain(label), loc="left", fontsize=10, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("iteration", fontsize=9, color=INK)
    whole_numbers(grid[0, 0], most=4)
    percent_ticks(grid[-1, 0])


def _clipped(metrics: Mapping[str, float]) -> float | None:
    low, high = (metrics.get(f"policy/clip_{side}") for side in ("low", "high"))
    return None if low is None or high is None else low + high


FIGURES = (
    ReportFigure(
        "kl-by-step",
        "KL(k3) between inference engine and trainer by iteration, logarithmic, not smoothed (R3's figure of the "
        "same). Lines are means over seeds, bands span them; where the KL is 0 they leave the figure below.",
        _kl_by_step,
    ),
    ReportFigure(
        "extreme-tokens",
        "Share F(τ) of response tokens whose probabilities in the two engines differ by more than a factor τ, over all "
        "iterations (R3). Lines leave the figure where no token is left; the dotted line is τ = 2, and the threshold's "
        "axis is logarithmic in τ - 1.",
        _extremes_by_threshold,
    ),
    ReportFigure(
        "router-differences",
        "Tokens by the number of layers in which rollout and trainer choose different experts, over all iterations "
        "(R3). Methods stand side by side at each number; bars span the seeds; 0 is not drawn.",
        _differing_routers,
    ),
    ReportFigure(
        "agreement",
        "Share of the reference's experts that the live router would choose itself, by mini-step, mean over iterations "
        "(PR2, figure 8). The reference is what the method replays; without replay, the rollout's routes.",
        _agreement_by_mini_step,
    ),
    ReportFigure(
        "deviation",
        "Share of (token, layer) in which one, two, or more experts are not those of the reference, over all "
        "mini-steps (PR2, figure 7). The legend has the share in which none differs; 0 is not drawn.",
        _deviation,
    ),
    ReportFigure(
        "coverage-gap",
        "Gate mass that the live router gives to experts other than the reference's, by mini-step, mean over "
        "iterations and layers (PR2, figure 6).",
        _coverage_gap,
    ),
    ReportFigure(
        "training-dynamics",
        "Reward, entropy, gradient norm and share of tokens clipped by iteration, not smoothed, a column for each "
        "method (PR2, figure 3). The grey line in each is the first method's.",
        _training_dynamics,
    ),
)
"""In the order of the report."""


def _lines(
    axes: "Axes", group: RunGroup, x_X: np.ndarray, values: Callable[[RunResults], np.ndarray], marked: bool = False
) -> None:
    """A line for each method and a band over its seeds."""
    for method, style in _styled(group):
        _line(axes, x_X, _stacked(method, values), style, plain(method.label), marked)


def _line(axes: "Axes", x_X: np.ndarray, values_SX: np.ndarray, style: Style, label: str, marked: bool = False) -> None:
    """The mean over seeds and a band from least to most; a single point is marked, or nothing would be seen."""
    mean_X, low_X, high_X = over_seeds(values_SX)
    if np.isnan(mean_X).all():
        return
    marker = style.marker if marked or np.isfinite(mean_X).sum() == 1 else ""
    told: dict[str, Any] = {"color": style.colour, "marker": marker, "label": label}
    axes.plot(x_X, mean_X, linestyle=style.dashes, linewidth=1.6, markersize=5, **told)
    if len(values_SX) > 1:
        axes.fill_between(x_X, low_X, high_X, color=style.colour, alpha=BAND_ALPHA, linewidth=0)


def _points(axes: "Axes", group: RunGroup, values: Callable[[RunResults], np.ndarray]) -> None:
    """A point for each method at each of a few numbers, side by side, with a bar over its seeds."""
    offsets = (np.arange(len(group.methods)) - (len(group.methods) - 1) / 2) * 0.7 / len(group.methods)
    for offset, (method, style) in zip(offsets, _styled(group), strict=True):
        mean_X, low_X, high_X = over_seeds(_stacked(method, values))
        x_X = np.arange(len(mean_X)) + offset
        # On a logarithmic axis a mark at 0 would stand on its lower end and look like a value.
        drawn = mean_X > 0
        told: dict[str, Any] = {"color": style.colour, "marker": style.marker, "label": plain(method.label)}
        axes.plot(x_X[drawn], mean_X[drawn], linestyle="", markersize=6, **told)
        axes.vlines(x_X[drawn], low_X[drawn], high_X[drawn], color=style.colour, linewidth=1.4)
        axes.set_xlim(-0.5, len(mean_X) - 0.5)


def _stacked(method: MethodRuns, values: Callable[[RunResults], np.ndarray]) -> np.ndarray:
    """The values of all runs of a method, [S, X]; a run that has none is a row of NaN."""
    rows = [values(run) for run in method.runs]
    longest = max(map(len, rows))
    return np.stack([np.pad(row.astype(np.float64), (0, longest - len(row)), constant_values=np.nan) for row in rows])


def _styled(group: RunGroup) -> list[tuple[MethodRuns, Style]]:
    styles = styles_of(group.labels)
    return [(method, styles[method.label]) for method in group.methods]


def _all_values(group: RunGroup, values: Callable[[RunResults], np.ndarray]) -> np.ndarray:
    """What is drawn: of each run, and the means over seeds, which are below every run's where one of them has 0."""
    means = [over_seeds(_stacked(method, values))[0] for method in group.methods]
    return np.concatenate([*(values(run) for run in group.runs), *means])


def _legend(figure: "Figure", axes: "Axes", told: dict[str, str] | None = None) -> None:
    """Above the panels, where it hides no line; a figure without lines says so."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        say(axes, "not stored for these runs")
        return
    shown = [f"{label} {told[label]}" if told else label for label in labels]
    columns = 6 if max(map(len, shown)) < 10 else 3 if max(map(len, shown)) < 30 else 2
    figure.legend(handles, shown, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
