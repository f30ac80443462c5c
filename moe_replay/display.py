"""What people see on the terminal: a table of results that grows while a run works."""

import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_STAGES = {"rollout": "rollout", "routes": "archive", "training": "train", "predictor": "fit", "evaluation": "eval"}
_HEADINGS = {
    "reward/mean": "reward",
    "mismatch/kl_k3": "KL k3",
    "mismatch/extreme_fraction": "extreme",
    "routing/agreement": "agree",
}


class _At(NamedTuple):
    """How far a stage is."""

    done: int
    total: int
    what: str

    def __str__(self) -> str:
        return f"{self.done} of {self.total} {self.what}" if self.total else self.what


class RunDisplay:
    """A live table on a terminal; elsewhere a line an iteration, and the table at the end."""

    def __init__(self, console: Console, title: str):
        self._console = console
        self._title = title
        self._results: dict[int, dict[str, float]] = {}
        self._at_work = {"": _At(0, 0, "starting")}
        self._changing = threading.Lock()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._console.print(self._title)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        with self._changing:
            self._at_work = {} if kind is None else {"": _At(0, 0, "stopped")}
        if self._console.is_terminal:
            self._live.stop()
        elif self._results:
            self._console.print(results_table(self._title, self._results))

    def on_progress(self, stage: str, done: int, total: int, what: str) -> None:
        """Show what a stage is at, beside others that are not through; called from the threads of both."""
        with self._changing:
            others = {other: at for other, at in self._at_work.items() if other != stage and at.done < at.total}
            self._at_work = {**others, stage: _At(done, total, what)}

    def on_result(self, _run_id: str, iteration: int, metrics: dict[str, float]) -> None:
        """Add an iteration's row."""
        self._results[iteration] = metrics
        if not self._console.is_terminal:
            columns = _columns([metrics])
            told = [f"{heading} {_cell(name, metrics.get(name))}" for name, heading in columns.items()]
            self._console.print(f"iteration {iteration}: {', '.join(told)}", soft_wrap=True, highlight=False)

    def on_alarm(self, told: str) -> None:
        """Say what the stability alarm saw, and what is done about it."""
        self._console.print(f"stability alarm, {told}", style="yellow", soft_wrap=True, highlight=False, markup=False)

    def on_retry(self, told: str) -> None:
        """Say that a stage is tried again, and the first line of why."""
        first = told.partition("\n")[0]
        self._console.print(first, style="yellow", soft_wrap=True, highlight=False, markup=False)

    def _render(self) -> Group:
        told = ", ".join(f"{stage}: {at}" if stage else str(at) for stage, at in self._at_work.items())
        return Group(results_table(self._title, self._results), Text(told, style="dim"))


def results_table(title: str, results: Mapping[int, dict[str, float]]) -> Table:
    """One row an iteration: the headline metrics, then the seconds that each stage took."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.caption = "from rollout on: seconds per stage"
    table.caption_justify = "left"
    table.add_column("#", justify="right")
    columns = _columns(results.values())
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for iteration, metrics in results.items():
        cells = [_cell(name, metrics.get(name)) for name in columns]
        table.add_row(str(iteration), *cells)
    return table


def _columns(results: Iterable[dict[str, float]]) -> dict[str, str]:
    """Metric key to heading; evaluation and stages only where some iteration has them."""
    seen = {name for metrics in results for name in metrics}
    evaluations = {name: name.split("/")[1] for name in sorted(seen) if name.endswith("/avg_at_n")}
    times = {f"time/{stage}": name for stage, name in _STAGES.items() if f"time/{stage}" in seen}
    return _HEADINGS | evaluations | times


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith("time/"):
        return f"{value:.2f}"
    return f"{value:.2e}" if name == "mismatch/kl_k3" else f"{value:.4f}"
