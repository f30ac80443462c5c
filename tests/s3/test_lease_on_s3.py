"""The lease on a run in an S3 store without conditional put, and what it costs."""

import time

import pytest
from fault_proxy import FaultProxy, Refusal, first

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.claims import Runner
from moe_replay.archive.lease import Lease, Pace, holding
from moe_replay.errors import RunInUse

QUICK = Pace(beat_seconds=0.2, ttl_seconds=2.0)


def test_a_second_runner_is_refused_and_takes_over_from_a_silent_one(store: RunStore, proxy: FaultProxy) -> None:
    elsewhere = Runner.this_process().model_copy(update={"host": "far"})
    with holding(store.folder, print, QUICK), pytest.raises(RunInUse):
        Lease(store.folder, QUICK, elsewhere).acquire(print)
    assert store.folder.files() == {}

    silent = Lease(store.folder, QUICK, elsewhere)
    silent.acquire(print)
    began = time.monotonic()
    with holding(store.folder, print, QUICK) as held:
        assert time.monotonic() - began >= QUICK.ttl_seconds
        held.require()
    assert store.folder.files() == {}


def test_a_heartbeat_costs_two_requests_and_survives_a_failing_store(store: RunStore, proxy: FaultProxy) -> None:
    lease = Lease(store.folder)
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
