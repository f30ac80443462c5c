"""What operations cost in requests and bytes, as the proxy counts them."""

import pytest
from archive_samples import DIGEST, commit_routes, make_trace, origin_of, same
from fault_proxy import Fault, FaultProxy, Refusal, Request, first

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.archive.storage import Storage
from moe_replay.errors import ConfigError

LAYERS = tuple(range(12))


@pytest.fixture
def archive(store: RunStore) -> RouteArchive:
    """Twelve layers of 4000 tokens in chunks of 1000."""
    traces = [make_trace(500, layers=LAYERS, seed=seed) for seed in range(8)]
    return RouteArchive.open(store.open(commit_routes(store, traces, origin_of(layers=LAYERS), chunk_tokens=1000)))


def test_one_layer_of_one_microbatch_reads_its_own_chunk_and_no_other(proxy: FaultProxy, archive: RouteArchive) -> None:
    proxy.forget()

    trace = archive.read(slice(1200, 1300), slice(5, 6))

    asked = {one.path.split("/routes/", 1)[1].rsplit("routes/", 1)[-1] for one in proxy.exchanges}
    assert asked == {"ids/c/5/1/0", "valid/c/1"}
    sizes = {stored.path: stored.size for stored in archive.artifact.commit.objects}
    received = sum(one.received for one in proxy.exchanges)
    assert received == sizes["routes/ids/c/5/1/0"] + sizes["routes/valid/c/1"]
    # One of 12 layers and of 4 chunks, and a little for what is valid.
    assert received < 1.1 * sum(sizes.values()) / 48
    assert same(trace, make_trace(500, layers=LAYERS, seed=2).slice_tokens(200, 300).select_layers([5]))


def test_a_chunk_that_is_missing_elsewhere_does_not_disturb_a_partial_read(
    proxy: FaultProxy, archive: RouteArchive
) -> None:
    proxy.plan = first(10**6, Refusal(404, "NoSuchKey"), "GET", "/ids/c/5/2/0")

    assert archive.read(slice(0, 2000)).num_tokens == 2000


def test_opening_an_archive_costs_a_fixed_few_requests(proxy: FaultProxy, store: RunStore, archive) -> None:
    proxy.forget()

    ref = store.commit_of("routes", 0)
    assert ref is not None
    RouteArchive.open(store.open(ref))

    assert {one.kind for one in proxy.exchanges} == {"GET"}
    assert len(proxy.exchanges) <= 12


def test_chunks_are_read_and_written_at_once_but_not_without_bound(proxy: FaultProxy, store: RunStore) -> None:
    proxy.latency = 0.03
    traces = [make_trace(100, layers=tuple(range(32)))]
    ref = commit_routes(store, traces, origin_of(layers=tuple(range(32))))
    written = proxy.most_at_once
    archive = RouteArchive.open(store.open(ref))
    proxy.forget()
    archive.read(slice(0, 100))

    assert 5 <= written <= 10
    assert 5 <= proxy.most_at_once <= 10


def test_an_object_costs_one_request_whether_it_is_there_or_not(proxy: FaultProxy, root: str) -> None:
    storage = Storage.at(root)
    storage.write("a", b"1")
    proxy.forget()

    assert storage.read("a") == b"1"
    assert storage.digest("a")[0] == 1
    with pytest.raises(FileNotFoundError):
        storage.read("b")

    assert [one.kind for one in proxy.exchanges] == ["GET", "GET", "GET"]


@pytest.mark.parametrize("size", [0, 1, 8 * 2**20 - 1, 8 * 2**20, 8 * 2**20 + 1])
def test_digests_of_objects_that_end_anywhere(size: int, root: str, tmp_path) -> None:
    storage, local = Storage.at(root), Storage.at(str(tmp_path))
    for place in (storage, local):
        place.write("a", b"x" * size)

    assert storage.digest("a") == local.digest("a")


def test_creation_loses_against_what_came_between_check_and_put(proxy: FaultProxy, root: str) -> None:
    storage = Storage.at(root)
    storage.write("a", b"another's")
    proxy.conditional = True
    proxy.plan = first(1, Refusal(404, "NoSuchKey"), "GET")

    with pytest.raises(FileExistsError):
        storage.create("a", b"ours")

    assert len(proxy.of("PUT")) == 2
    assert storage.read("a") == b"another's"


@pytest.mark.parametrize("conditional", [True, False])
def test_a_commit_whose_answer_was_lost_meets_itself(conditional: bool, proxy: FaultProxy, store: RunStore) -> None:
    proxy.conditional = conditional
    proxy.plan = first(1, Fault.LOST_ANSWER, "PUT", "/_committed.json")

    ref = commit_routes(store, [make_trace(9)])

    assert store.find("routes", 0, {}, DIGEST) == ref
    assert len(proxy.of("PUT", "/_committed.json")) == 2


@pytest.mark.parametrize("answer", [Refusal(501, "NotImplemented"), Refusal(409, "ConditionalRequestConflict")])
def test_a_commit_is_put_where_the_store_knows_no_conditions_or_met_another_writer(
    answer: Refusal, proxy: FaultProxy, store: RunStore
) -> None:
    refused = []

    def refuse_once(request: Request) -> Refusal | None:
        if "if-none-match" not in request.headers or refused:
            return None
        refused.append(request.path)
        return answer

    proxy.plan = refuse_once
    ref = commit_routes(store, [make_trace(9)])

    assert refused
    assert store.find("routes", 0, {}, DIGEST) == ref


def test_a_second_runner_with_another_configuration_is_refused(store: RunStore) -> None:
    store.create_run({"seed": 1})

    with pytest.raises(ConfigError, match="seed"):
        store.create_run({"seed": 2})
