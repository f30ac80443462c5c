"""The report and its figures as files."""

import base64
import re
import struct
from html.parser import HTMLParser

import pytest
from run_samples import DIGEST, in_memory, make_run

from moe_replay.drawing import new_figure, save_figure
from moe_replay.errors import ConfigError
from moe_replay.reports.figures import FIGURES
from moe_replay.reports.groups import group_runs
from moe_replay.reports.html import write_report
from moe_replay.reports.runs import read_results

HOSTILE = "<script>alert(1)</script>$\\frac"


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def size_of(path) -> tuple[int, int]:
    """Width and height of a PNG file."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two methods and two seeds, one method with a name that would harm the page."""
    root, out = in_memory(), tmp_path_factory.mktemp("report")
    runs = [
        read_results(make_run(root, f"{method}-{seed}", method, seed, scale=scale, label=label, iterations=3))
        for method, scale, label in (("grpo", 1.0, None), ("r3", 0.1, HOSTILE))
        for seed in (0, 1)
    ]
    return write_report(runs, out / "new" / "deep", f"title {HOSTILE}", f"moe-replay compare {HOSTILE}")


def test_the_page_needs_nothing_else_and_holds_every_figure(report):
    page = Page(report.html.read_text(encoding="utf-8"))
    assert len(report.figures) == len(FIGURES) == page.tags.count("img")
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    assert embedded == [figure.read_bytes() for figure in report.figures]
    assert not re.search(r"https?://|url\(|@import", report.html.read_text(encoding="utf-8"))


def test_nothing_of_a_run_becomes_part_of_the_page(report):
    page = Page(report.html.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 4


def test_the_page_says_what_was_found_and_how_it_was_made(report):
    text = Page(report.html.read_text(encoding="utf-8")).text
    assert "Mismatch KL(k3), against grpo: lower: " in text
    assert "Qwen3-30B-A3B" in text
    assert "within noise" in text
    assert all(run in text for run in ("grpo-0", "grpo-1", "r3-0", "r3-1"))


def test_figures_are_large_enough_to_read(report):
    for figure in report.figures:
        width, height = size_of(figure)
        assert width >= 1000
        assert height >= 600


def test_figures_are_drawn_of_one_iteration_of_one_run_that_kept_nothing_but_metrics(tmp_path):
    store = make_run(in_memory(), "a", "_hidden$", iterations=0)
    store.begin("training", 0, {}, DIGEST).commit({"mismatch/kl_k3": 0.0}, {"method": "_hidden$"})
    (group,) = group_runs([read_results(store)])
    for wanted in FIGURES:
        figure = new_figure(7, 4, dpi=40)
        wanted.draw(figure, group)
        save_figure(figure, tmp_path / f"{wanted.name}.png")
        assert size_of(tmp_path / f"{wanted.name}.png")[0] >= 200


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    run = read_results(make_run(in_memory(), "a", iterations=1))
    with pytest.raises(ConfigError, match="can't be made"):
        write_report([run], tmp_path / "file" / "out", "title", "command")
