"""A runner that holds the lease on a run and nothing else; started by tests as a process of its own.

Says on standard output what becomes of it. Leaves when its standard input ends.
"""

import sys
import threading
import time

from moe_replay.archive.lease import Pace, holding
from moe_replay.archive.storage import Storage
from moe_replay.errors import LeaseLost, RunInUse

QUICK = Pace(beat_seconds=0.15, ttl_seconds=1.5)


def say(what: str) -> None:
    print(what, flush=True)


def main(folder: str) -> None:
    left = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), left.set()), daemon=True).start()
    try:
        with holding(Storage.at(folder), lambda what: say(f"waits {what}"), QUICK) as lease:
            say("holds")
            while not left.is_set():
                lease.require()
                time.sleep(0.01)
        say("left")
    except (RunInUse, LeaseLost) as error:
        say(f"{type(error).__name__} {error}")


if __name__ == "__main__":
    main(sys.argv[1])
