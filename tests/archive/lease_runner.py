"""A runner that holds the lease on a run and nothing else; started by tests as a process of its own.

Says on standard output what becomes of it. Leaves when its standard input ends. A file tells by how many seconds its
clock is ahead of the machine's.
"""

import sys
import threading
import time
from pathlib import Path

from moe_replay.archive.lease import Pace, holding, since_boot
from moe_replay.archive.storage import Storage
from moe_replay.errors import LeaseLost, RunInUse

TTL_SECONDS = 600.0
"""Longer than any machine keeps a process from running: only a test that moves the clock sees it pass."""
PACE = Pace(beat_seconds=0.15, ttl_seconds=TTL_SECONDS)


def say(what: str) -> None:
    print(what, flush=True)


def main(folder: str, ahead: Path) -> None:
    left = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), left.set()), daemon=True).start()
    pace = Pace(PACE.beat_seconds, PACE.ttl_seconds, lambda: since_boot() + float(ahead.read_text()))
    try:
        with holding(Storage.at(folder), lambda what: say(f"waits {what}"), pace) as lease:
            say("holds")
            while not left.is_set():
                lease.require()
                time.sleep(0.01)
            lease.require()
        say("left")
    except (RunInUse, LeaseLost) as error:
        say(f"{type(error).__name__} {error}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
