"""Runners of one run on a store without conditional put, where each request of theirs may come at any time."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_store import Killed, Turns, stepped_run

from moe_replay.archive.claims import Runner
from moe_replay.archive.lease import Lease, Pace
from moe_replay.archive.storage import Storage
from moe_replay.errors import LeaseLost, RunInUse, StorageUnavailable

TTL = 40.0
"""In requests of all runners together, which are all the time that passes."""
STAGES = 3


@dataclass
class Held:
    """Who has the run, by what the runners were told; only one of them runs at a time."""

    by: list[int] = field(default_factory=list)
    """In order of taking over. Only the last one may be told that the run is still its own."""


def runner_on(machine: int) -> Runner:
    return Runner(host=f"host-{machine}", boot=None, pid_namespace=None, pid=1, started=None)


def work(number: int, run: Storage, held: Held, ttl: float, clock: Callable[[], float]) -> str:
    """Take the run and do a few stages, each of a few requests."""
    lease = Lease(run, Pace(1.0, ttl, clock, lambda _: None), runner_on(number))
    try:
        lease.acquire(lambda _: None)
        held.by.append(number)
        for _ in range(STAGES):
            lease.require()
            assert held.by[-1] == number, f"{held.by[-1]} took over from {number}, which is told that it still holds"
            for _ in range(4):
                run.write(f"work-{number}", b"")
        return "worked"
    except (RunInUse, LeaseLost, StorageUnavailable) as error:
        return type(error).__name__
    finally:
        lease.release()


def played(schedule: list[int], killed: dict[int, int], ttl: float) -> tuple[list[object], Held]:
    held, run = Held(), stepped_run(puts_conditionally=False).folder
    turns: Turns
    runners = [lambda n=n: work(n, run, held, ttl, lambda: float(turns.requests)) for n in range(3)]
    turns = Turns(runners)
    # In rounds at last: one that waits for another would else ask in vain.
    return turns.play([*schedule, *[0, 1, 2] * 400], killed), held


# Long pauses of one while another works are what a lease has to bear.
schedules = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), max_size=25).map(
    lambda turns: [n for n, requests in turns for _ in range(requests)]
)
kills = st.dictionaries(st.integers(0, 2), st.integers(0, 60), max_size=2)


@settings(max_examples=150, deadline=None)
@given(schedule=schedules, killed=kills)
def test_in_no_order_of_requests_two_runners_hold_and_the_dead_keep_none(schedule, killed):
    results, held = played(schedule, killed, TTL)
    assert all(isinstance(result, str | Killed) for result in results), results
    assert held.by or killed


@settings(max_examples=50, deadline=None)
@given(schedule=st.lists(st.integers(0, 2), max_size=80))
def test_of_three_that_come_at_once_one_holds_at_a_time_and_the_others_are_refused(schedule):
    results, held = played(schedule, {}, ttl=float("inf"))
    assert "worked" in results
    assert set(results) <= {"worked", "RunInUse"}
    assert sorted(held.by) == sorted(n for n, result in enumerate(results) if result == "worked")
