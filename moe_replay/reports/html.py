"""The report of a comparison: one HTML file that needs nothing else, and its figures as PNG files beside it."""

import base64
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from moe_replay.archive.storage import file_aside
from moe_replay.errors import ConfigError
from moe_replay.reports.comparison import MethodComparison, Row, compare_methods
from moe_replay.reports.figures import FIGURES, draw_figure
from moe_replay.reports.groups import RunGroup, group_runs
from moe_replay.reports.measures import shown
from moe_replay.reports.papers import papers_beside
from moe_replay.reports.runs import RunResults
from moe_replay.reports.summary import summary_of
from moe_replay.reports.template import TEMPLATE

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class ReportFiles:
    """What a report was written to."""

    html: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class _Picture:
    file: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture itself, as the source of an image."""
        return f"data:image/png;base64,{base64.b64encode(self.file.read_bytes()).decode()}"


def write_report(
    runs: Sequence[RunResults], folder: Path, title: str, command: str, baseline: str | None = None
) -> ReportFiles:
    """Write `report.html` and the figures to `folder`, which is made; what is there under their names is replaced.

    `command` is how to make the report again. Raises ConfigError as `group_runs` and `compare_methods` do, and when
    `folder` can't be written to.
    """
    groups = group_runs(runs)
    comparison = compare_methods(groups, baseline)
    _make(folder)
    pictures = [_draw(group, folder) for group in groups]
    html = _render(groups, comparison, pictures, title, command)
    path = folder / REPORT_FILE
    try:
        with file_aside(path) as partial:
            partial.write_text(html, encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}); choose another folder") from error
    return ReportFiles(path, tuple(picture.file for drawn in pictures for picture in drawn))


def command_of(program: str, runs: Sequence[str], baseline: str | None, folder: str, root: str | None) -> str:
    """The command that makes a report of these runs."""
    words = [program, "compare", *runs, "--out", folder]
    words += ["--baseline", baseline] if baseline else []
    return shlex.join([*words, *(["--root", root] if root else [])])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {folder} can't be made ({error.strerror}); choose another") from error


def _draw(group: RunGroup, folder: Path) -> list[_Picture]:
    drawn = []
    for figure in FIGURES:
        path = folder / f"{figure.name}-kappa{group.mini_steps}.png"
        draw_figure(figure, group, path)
        drawn.append(_Picture(path, figure.name.replace("-", " "), figure.caption))
    return drawn


def _render(
    groups: Sequence[RunGroup],
    comparison: MethodComparison,
    pictures: list[list[_Picture]],
    title: str,
    command: str,
) -> str:
    # All that comes from runs is escaped; the template has no filter that undoes it.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=title,
        command=command,
        comparison=comparison,
        parts=list(zip(comparison.groups, pictures, strict=True)),
        summary=summary_of(comparison),
        papers=papers_beside(groups),
        shown=shown,
        tone=_tone,
    )


def _tone(row: Row, verdict: str | None) -> str:
    """How a verdict is coloured: by whether it is to the good, where a measure knows one."""
    if verdict not in ("lower", "higher") or row.better is None:
        return "plain"
    return "good" if verdict == row.better else "bad"
