"""Claims as some other runner leaves them, and patience with slow machines."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from moe_replay.archive.claims import Claim, Runner
from moe_replay.archive.storage import Storage

TOKEN = "0" * 32
LONGEST = 300
"""Seconds that a machine may take for what takes a moment."""


def claim_of(runner: Runner, beat: int = 1, state: str = "holding") -> Claim:
    return Claim(state=state, runner=runner, began=datetime.now(UTC), beat=beat, at=datetime.now(UTC))


def put(run: Path, claim: Claim, token: str = TOKEN) -> None:
    """A claim as some other runner leaves it."""
    folder = Storage.at(str(run)) / "_lease"
    folder.write(f"{token}.json", claim.to_bytes())
    folder.write(f"{token}.claim", b"{}\n")


def here(**changes: object) -> Runner:
    return Runner.this_process().model_copy(update=changes)


def elsewhere() -> Runner:
    return here(host="far", boot="ffff")


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < deadline, f"not within {LONGEST} s: {what}"
        time.sleep(0.01)
