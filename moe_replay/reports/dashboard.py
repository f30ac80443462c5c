"""One figure for one run, from its first iteration on: is it healthy, and does replay hold what it promises?

Legend of shapes: N iterations, P mini-steps, X points of an axis.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.drawing import (
    BAND_ALPHA,
    INK,
    MUTED,
    ONE_RUN,
    dress,
    logarithmic,
    new_figure,
    over_seeds,
    percent_ticks,
    plain,
    save_figure,
    say,
    whole_numbers,
)
from moe_replay.reports import series
from moe_replay.reports.measures import agreement_gain, kl_saved, metric
from moe_replay.reports.runs import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

_ACCENT = "#D55E00"
_WIDTH, _HEIGHT, _DPI = 15.0, 7.4, 110


def draw_dashboard(results: RunResults, path: Path) -> None:
    """Draw a run's dashboard to a PNG file; raises ConfigError when it can't be written."""
    # Drawn after every iteration, so at places that are known.
    figure = new_figure(_WIDTH, _HEIGHT, _DPI, arranged=False)
    grid = figure.add_gridspec(2, 4, left=0.045, right=0.99, top=0.9, bottom=0.075, wspace=0.23, hspace=0.32)
    _mismatch(figure.add_subplot(grid[0, 0]), results)
    _by_mini_step(figure.add_subplot(grid[0, 1]), series.agreements(results), "Agreement with the reference")
    _deviation(figure.add_subplot(grid[0, 2]), results)
    _by_mini_step(figure.add_subplot(grid[0, 3]), series.coverage_gaps(results), "Coverage gap")
    _predictor(figure.add_subplot(grid[1, 0]), results)
    _policy_health(figure, grid[1, 1], results)
    _reward(figure.add_subplot(grid[1, 2]), results)
    _evaluation(figure.add_subplot(grid[1, 3]), results)
    figure.suptitle(_title(results), x=0.01, y=0.985, ha="left", fontsize=12.5, color=INK)
    save_figure(figure, path)


def _title(results: RunResults) -> str:
    done = len(results.iterations)
    told = [
        plain(results.run_id),
        plain(results.method),
        f"κ = {results.mini_steps}",
        f"seed {results.seed}",
        f"model {plain(results.model)}",
        f"{done} iteration{'' if done == 1 else 's'}",
    ]
    return "   ·   ".join(told)


def _mismatch(axes: "Axes", results: RunResults) -> None:
    kl_N = series.by_iteration(results, metric("mismatch/kl_k3"))
    extreme_N = series.by_iteration(results, metric("mismatch/extreme_fraction"))
    x_N = _iterations(results)
    _line(axes, x_N, kl_N)
    has_extreme_N = extreme_N > 0
    axes.plot(x_N[has_extreme_N], kl_N[has_extreme_N], "o", color=_ACCENT, markersize=5, label="with an extreme token")
    logarithmic(axes, kl_N)
    dress(axes, f"KL(k3); {has_extreme_N.sum()} of {len(x_N)} iterations extreme", "iteration")
    whole_numbers(axes)
    if has_extreme_N.any():
        _legend(axes)


def _by_mini_step(axes: "Axes", values_NP: np.ndarray, title: str) -> None:
    """The mean over iterations with their range, and the latest, by mini-step."""
    if np.isnan(values_NP).all():
        dress(axes, title)
        say(axes, "statistics by layer are not stored")
        return
    x_P = np.arange(1, values_NP.shape[1] + 1)
    mean_P, low_P, high_P = over_seeds(values_NP)
    if len(values_NP) > 1:
        axes.fill_between(x_P, low_P, high_P, color=ONE_RUN, alpha=BAND_ALPHA, linewidth=0, label="range")
        axes.plot(x_P, mean_P, color=ONE_RUN, marker="o", markersize=4, linewidth=1.6, label="mean of iterations")
    axes.plot(x_P, values_NP[-1], color=_ACCENT, marker="o", markersize=3, linewidth=1, linestyle="--", label="latest")
    dress(axes, title, "mini-step")
    percent_ticks(axes)
    whole_numbers(axes)
    _legend(axes)


def _deviation(axes: "Axes", results: RunResults) -> None:
    shares_D = series.deviations(results)
    if np.isnan(shares_D).all():
        dress(axes, "Deviation from the reference")
        say(axes, "not measured")
        return
    bars = axes.bar(["1", "2", "3 or more"], 100 * shares_D[1:], color=ONE_RUN, width=0.6)
    axes.bar_label(bars, [f"{share:.3%}" for share in shares_D[1:]], fontsize=8.5, color=INK, padding=2)
    axes.margins(y=0.15)
    dress(axes, f"Deviation: {shares_D[0]:.2%} of routes unchanged", "experts that differ", "% of (token, layer)")


def _predictor(axes: "Axes", results: RunResults) -> None:
    left_N = 1 - series.by_iteration(results, kl_saved)
    title = "Predictor: KL over the zero predictor's"
    if np.isnan(left_N).all():
        dress(axes, title)
        say(axes, "no predictor fitted")
        return
    gain_N = series.by_iteration(results, agreement_gain)
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=":", label="zero predictor")
    _line(axes, _iterations(results), left_N)
    dress(axes, title, f"iteration (agreement gained: {100 * np.nanmean(gain_N):+.3f} pp)")
    whole_numbers(axes)
    _legend(axes)


def _policy_health(figure: "Figure", place: "SubplotSpec", results: RunResults) -> None:
    """Three quantities of three scales, above each other."""
    rows = place.subgridspec(3, 1, hspace=0.25)
    panels = {
        "grad norm": {"": metric("policy/grad_norm")},
        "entropy": {"": metric("policy/entropy")},
        "clipped": {"low": metric("policy/clip_low"), "high": metric("policy/clip_high")},
    }
    x_N = _iterations(results)
    for row, (name, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows[row])
        for (label, value), colour in zip(lines.items(), (ONE_RUN, _ACCENT), strict=False):
            _line(axes, x_N, series.by_iteration(results, value), colour, label)
        last = row == len(panels) - 1
        dress(axes, "Policy health" if row == 0 else "", "iteration" if last else "", name)
        axes.locator_params(axis="y", nbins=3)
        whole_numbers(axes)
        if not last:
            axes.tick_params(labelbottom=False)
        if len(lines) > 1:
            percent_ticks(axes)
            # Above the panel, which is too low to hold both.
            axes.legend(loc="lower right", bbox_to_anchor=(1, 0.9), ncols=2, frameon=False, fontsize=8)


def _reward(axes: "Axes", results: RunResults) -> None:
    reward_N = series.by_iteration(results, metric("reward/mean"))
    _line(axes, _iterations(results), reward_N)
    dress(axes, f"Reward, latest {reward_N[-1]:.3f}", "iteration")
    whole_numbers(axes)


def _evaluation(axes: "Axes", results: RunResults) -> None:
    keys = sorted({key for part in results.iterations for key in part.metrics if key.startswith("eval/")})
    colours = (ONE_RUN, _ACCENT, "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#5f5f5f")
    benchmarks = sorted({key.split("/")[1] for key in keys})
    dress(axes, "Evaluation", "iteration")
    for key in keys:
        _, benchmark, kind = key.split("/")
        values_N = series.by_iteration(results, metric(key))
        known_N = np.isfinite(values_N)
        colour = colours[benchmarks.index(benchmark) % len(colours)]
        style = ("-", "o") if kind == "avg_at_n" else ("--", "s")
        label = f"{plain(benchmark)} {kind.replace('_at_', '@')}"
        _line(axes, _iterations(results)[known_N], values_N[known_N], colour, label, *style)
    whole_numbers(axes)
    if keys:
        _legend(axes)
    else:
        say(axes, "not evaluated yet")


def _line(
    axes: "Axes",
    x_X: np.ndarray,
    values_X: np.ndarray,
    colour: str = ONE_RUN,
    label: str = "",
    dashes: str = "-",
    marker: str = "",
) -> None:
    """A line; where it is a single point, that is marked."""
    single = np.isfinite(values_X).sum() == 1
    shown_label = label or None
    axes.plot(
        x_X,
        values_X,
        dashes,
        color=colour,
        linewidth=1.5,
        marker=marker or ("o" if single else ""),
        markersize=4,
        label=shown_label,
    )


def _legend(axes: "Axes") -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _iterations(results: RunResults) -> np.ndarray:
    return np.array([part.iteration for part in results.iterations])
