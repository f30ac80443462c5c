"""What a store that fails now and then, or for a while, does to archives: nothing."""

import os
import time

import pytest
from archive_samples import DIGEST, commit_routes, digests_of, make_trace, origin_of, same
from fault_proxy import SLOW_DOWN, TRANSIENT, Fault, FaultProxy, Request, always, at_random, first, no_faults
from s3_server import forget_clients

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive, verify_routes, write_routes
from moe_replay.archive.storage import Storage
from moe_replay.errors import StorageUnavailable


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy) -> None:
    """botocore repeats no request, so that what moe-replay repeats itself is seen, and seen soon."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_clients()


def test_archives_are_written_and_read_whole_while_a_quarter_of_all_requests_fail(
    proxy: FaultProxy, store: RunStore
) -> None:
    traces = [make_trace(100, seed=seed, missing=(99,)) for seed in range(3)]
    proxy.plan = at_random(0.25, seed=1)

    store.create_run({"seed": 1})
    store.create_run({"seed": 1})
    ref = commit_routes(store, traces, chunk_tokens=150)
    assert store.find("routes", 0, {}, DIGEST) == ref
    read = RouteArchive.open(store.open(ref)).read_sequences(0, 3)

    assert all(same(a, b) for a, b in zip(read, traces, strict=True))
    failed = [one for one in proxy.exchanges if one.status is None or one.status >= 500]
    assert len(failed) > 0.15 * len(proxy.exchanges), "too few faults to prove anything"
    proxy.plan = no_faults
    assert verify_routes(store.open(ref)) == []


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("kind", ["PUT", "GET", "LIST", "DELETE"])
def test_each_kind_of_request_survives_each_kind_of_fault(kind: str, proxy: FaultProxy, root: str) -> None:
    storage, data = Storage.at(root), os.urandom(5000)
    for fault in TRANSIENT:
        proxy.plan = first(2, fault, kind)
        proxy.forget()

        storage.write("a", data)
        assert storage.read("a") == data
        assert storage.sizes() == {"a": 5000}
        storage.remove("a")

        assert len(proxy.of(kind)) >= 3, f"{fault} never came"
        assert storage.sizes() == {}


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("fault", [Fault.RESET_BEFORE, Fault.TRUNCATED_ANSWER, SLOW_DOWN], ids=str)
def test_a_store_that_stays_down_is_unavailable_within_bounded_tries_and_used_again_when_back(
    fault, proxy: FaultProxy, root: str
) -> None:
    storage = Storage.at(root)
    storage.write("a", b"precious")
    proxy.plan = always(fault)
    proxy.forget()

    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="try again once the storage answers"):
        storage.read("a")

    assert time.monotonic() - started < 10
    # aiohttp itself repeats what failed on a connection it had kept.
    assert len(proxy.exchanges) <= 12
    proxy.plan = no_faults
    assert storage.read("a") == b"precious"


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("puts", [3, 11])
def test_a_store_that_goes_down_in_the_middle_of_a_write_leaves_nothing_and_the_stage_begins_again(
    puts: int, proxy: FaultProxy, store: RunStore
) -> None:
    trace = make_trace(40)

    def write() -> None:
        writer = store.begin("routes", 0, {}, DIGEST)
        write_routes(writer, [(trace, digests_of([trace])[0])], origin_of(), chunk_tokens=16)
        writer.commit()

    def down_after_some_puts(request: Request) -> Fault | None:
        return Fault.RESET_BEFORE if len(proxy.of("PUT")) >= puts else None

    proxy.plan = down_after_some_puts
    with pytest.raises(StorageUnavailable):
        write()
    proxy.plan = no_faults
    assert store.commit_of("routes", 0) is None

    write()

    ref = store.commit_of("routes", 0)
    assert ref is not None
    assert verify_routes(store.open(ref)) == []


def test_a_large_object_goes_in_parts_and_survives_faults_in_them(proxy: FaultProxy, root: str, tmp_path) -> None:
    storage, source, copy = Storage.at(root), tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(2**20) * 101)
    left = {"PART": Fault.RESET_IN_REQUEST, "END": Fault.LOST_ANSWER, "RANGE": Fault.TRUNCATED_ANSWER}

    def each_once(request: Request) -> Fault | None:
        end = request.method == "POST" and "uploadId" in request.query
        return left.pop("END" if end else "RANGE" if "range" in request.headers else request.kind, None)

    proxy.plan = each_once
    storage.take(source, "large")
    storage.download("large", copy)

    assert not left, "not sent or not fetched in parts"
    assert copy.read_bytes() == source.read_bytes()
    # The upload whose end was answered to nobody is made again.
    assert len(proxy.of("PART")) >= 7
