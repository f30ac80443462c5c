"""The lease on a run in an S3 store without conditional put, and what it costs."""

import threading
import time

import pytest
from fault_proxy import FaultProxy, Refusal, Request, first
from passing_time import Clock

from moe_replay.archive import lease as lease_module
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.claims import Runner
from moe_replay.archive.lease import Lease, Pace, holding
from moe_replay.errors import RunInUse

LONGEST = 300
"""Seconds that a machine may take for what takes a moment."""
BEATING = Pace(beat_seconds=0.2, ttl_seconds=LONGEST)


@pytest.fixture
def elsewhere() -> Runner:
    return Runner.this_process().model_copy(update={"host": "far"})


def test_a_second_runner_is_refused_while_the_first_one_beats(store: RunStore, elsewhere: Runner) -> None:
    with holding(store.folder, print, BEATING), pytest.raises(RunInUse):
        Lease(store.folder, BEATING, elsewhere).acquire(print)
    assert store.folder.files() == {}


def test_a_silent_runner_is_taken_over_after_the_time_to_live(store: RunStore, elsewhere: Runner) -> None:
    clock = Clock()
    Lease(store.folder, clock.pace(), elsewhere).acquire(print)
    with holding(store.folder, print, clock.pace()) as held:
        assert clock.now == clock.pace().ttl_seconds
        held.require()
    assert store.folder.files() == {}


def test_a_claim_whose_heartbeat_hangs_when_its_runner_leaves_is_removed_once_the_store_goes_on(
    store: RunStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_LEAVE_SECONDS", 0.1)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(request: Request) -> None:
        hangs.set()
        goes_on.wait()

    with holding(store.folder, print, Clock().pace(beat_seconds=0.05)):
        proxy.plan = hang
        assert hangs.wait(LONGEST)
    goes_on.set()
    deadline = time.monotonic() + LONGEST
    while store.folder.files():
        assert time.monotonic() < deadline, "the claim stays"
        time.sleep(0.05)


def test_a_heartbeat_costs_two_requests_and_survives_a_failing_store(store: RunStore, proxy: FaultProxy) -> None:
    lease = Lease(store.folder, Clock().pace())
    lease.acquire(print)
    proxy.forget()
    lease.renew()
    assert sorted(one.kind for one in proxy.exchanges) == ["LIST", "PUT"]
    proxy.plan = first(2, Refusal(503, "SlowDown"), "PUT")
    lease.renew()
    lease.require()
    proxy.forget()
    lease.require()
    assert proxy.exchanges == []
    lease.release()
