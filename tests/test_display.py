"""What the terminal shows of the stages at work."""

import io
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from moe_replay.display import RunDisplay

TITLE = "a run"


class Terminal(io.StringIO):
    """Keeps what is drawn on it."""

    def line(self) -> str:
        """The last line of what is drawn next."""
        drawn = len(self.getvalue())
        deadline = time.monotonic() + 20
        # What comes first may have been on its way.
        while len(frames := self.getvalue()[drawn:].split(TITLE)) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [row.strip() for row in frames[2].split("\x1b")[0].splitlines() if row.strip()][-1]


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def display(terminal: Terminal) -> Iterator[RunDisplay]:
    console = Console(file=terminal, force_terminal=True, color_system=None, width=100, height=20)
    with RunDisplay(console, TITLE) as shown:
        yield shown


def test_stages_beside_each_other_are_both_shown_until_one_is_through(display: RunDisplay, terminal: Terminal) -> None:
    display.on_progress("rollout", 3, 8, "responses")
    display.on_progress("training", 0, 4, "mini-batches")
    assert terminal.line() == "rollout: 3 of 8 responses, training: 0 of 4 mini-batches"
    display.on_progress("rollout", 8, 8, "responses")
    assert terminal.line() == "training: 0 of 4 mini-batches, rollout: 8 of 8 responses"
    display.on_progress("training", 1, 4, "mini-batches")
    assert terminal.line() == "training: 1 of 4 mini-batches"


def test_what_stages_of_two_threads_said_last_is_shown(display: RunDisplay, terminal: Terminal) -> None:
    def work(stage: str) -> None:
        for done in range(20_000):
            display.on_progress(stage, done, 20_000, "parts")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(work, ("rollout", "training")))
    finally:
        sys.setswitchinterval(before)
    assert sorted(terminal.line().split(", ")) == [f"{s}: 19999 of 20000 parts" for s in ("rollout", "training")]


def test_what_is_tried_again_is_told_in_one_line() -> None:
    written = io.StringIO()
    with RunDisplay(Console(file=written, width=40), TITLE) as shown:
        shown.on_retry("rollout-3 is tried again, attempt 2 of 3: the engine [rollout] ended\nEnd of its log:\n...")
    told = written.getvalue().splitlines()
    assert told == [TITLE, "rollout-3 is tried again, attempt 2 of 3: the engine [rollout] ended"]
