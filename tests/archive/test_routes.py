import json
import uuid

import numpy as np
import pytest
import zarr
from archive_samples import DIGEST, batches, commit_routes, digests_of, make_trace, origin_of, same
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import FsspecStore

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive, token_digest, verify_routes, write_routes
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace

TRACES = [make_trace(n, seed=n, missing=(n - 1,)) for n in (7, 1, 12, 5)]


def fresh_store():
    return RunStore(f"memory://{uuid.uuid4().hex}", "run-1")


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from([1, 3, 7, 65536]))
def test_routes_round_trip(batch, chunk_tokens):
    origin, traces = batch
    store = fresh_store()
    artifact = store.open(commit_routes(store, traces, origin, chunk_tokens=chunk_tokens))
    archive = RouteArchive.open(artifact)
    read = archive.read_sequences(0, len(traces))
    assert len(read) == len(traces)
    assert all(same(a, b) for a, b in zip(read, traces, strict=True))
    assert verify_routes(artifact) == []
    archive.require_tokens(digests_of(traces))
    summary = archive.summary()
    assert (summary.tokens, summary.sequences) == (sum(t.num_tokens for t in traces), len(traces))
    assert summary.captured_rows == sum(int(t.valid_T.sum()) for t in traces)
    assert summary.captured_rows + summary.missing_rows == summary.tokens


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_range_of_tokens_and_layers_reads_the_same_as_a_slice_of_all(data):
    whole, archive = RoutingTrace.concatenate(TRACES), opened_archive()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 25), st.integers(0, 25))))
    first = data.draw(st.integers(0, 2))
    layers = slice(first, data.draw(st.integers(first + 1, 3)))
    part = archive.read(slice(start, stop), layers)
    assert same(part, whole.slice_tokens(start, stop).select_layers(whole.layers[layers]))


def opened_archive(chunk_tokens=4):
    store = fresh_store()
    return RouteArchive.open(store.open(commit_routes(store, TRACES, chunk_tokens=chunk_tokens)))


def test_a_partial_read_touches_only_the_chunks_it_needs(monkeypatch):
    archive = opened_archive(chunk_tokens=4)
    touched = []
    get = FsspecStore.get

    async def counted(self, key, *args, **kwargs):
        touched.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(FsspecStore, "get", counted)
    archive.read(slice(5, 12), slice(1, 2))
    assert sorted(touched) == ["ids/c/1/1/0", "ids/c/1/2/0", "valid/c/1", "valid/c/2"]


def test_an_archive_of_two_roots_has_the_same_commit(tmp_path):
    assert commit_routes(RunStore(str(tmp_path), "run-1"), TRACES) == commit_routes(fresh_store(), TRACES)


def test_routes_are_written_while_they_come_in():
    store = fresh_store()
    writer = store.begin("routes", 0, {}, DIGEST)
    written_before = []

    def sequences():
        for trace, digest in zip(TRACES, digests_of(TRACES), strict=True):
            written_before.append(sum("/ids/c/" in path for path in writer._written))
            yield trace, digest

    write_routes(writer, sequences(), origin_of(), chunk_tokens=4)
    assert written_before == [0, 3, 6, 15]


@pytest.mark.parametrize("tokens", [slice(-1, 3), slice(3, 2), slice(0, 26), slice(0, 4, 2)])
def test_a_range_outside_the_archive_is_refused(tokens):
    with pytest.raises(RoutingMismatch, match="25 tokens"):
        opened_archive().read(tokens)


def test_routes_of_other_tokens_are_refused_by_sequence():
    digests = digests_of(TRACES)
    digests[2] = token_digest([1, 2, 3])
    with pytest.raises(RoutingMismatch, match="sequence 2"):
        opened_archive().require_tokens(digests)


def test_routes_of_fewer_sequences_are_refused():
    with pytest.raises(RoutingMismatch, match="4 sequences, the rollout has 3"):
        opened_archive().require_tokens(digests_of(TRACES)[:3])


@pytest.mark.parametrize("other", [{"num_experts": 17}, {"top_k": 3}, {"layers": (1, 2, 6)}])
def test_a_sequence_of_another_model_is_not_archived(local_store, other):
    with pytest.raises(RoutingMismatch, match="sequence 1"):
        commit_routes(local_store, [make_trace(3), make_trace(3, **other)])


def test_a_token_digest_depends_on_order_and_not_on_dtype():
    assert token_digest(np.array([1, 2], np.int64)) == token_digest([1, 2])
    assert token_digest([1, 2]) != token_digest([2, 1])
    assert len(token_digest([])) == 16


def test_token_ids_beyond_32_bits_are_refused():
    with pytest.raises(RoutingMismatch, match="32 bits"):
        token_digest([2**31])


def objects_of(store, ref):
    return [stored.path for stored in store.open(ref).commit.objects] + ["_committed.json"]


def read_all(store, ref):
    archive = RouteArchive.open(store.open(ref))
    archive.require_tokens(digests_of(TRACES))
    return archive.read_sequences(0, archive.num_sequences)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), damage=st.sampled_from(["flip", "truncate", "delete", "swap"]))
def test_no_damage_to_any_object_is_ever_read_silently(tmp_path_factory, data, damage):
    root = tmp_path_factory.mktemp("damaged")
    store = RunStore(str(root), "run-1")
    ref = commit_routes(store, TRACES, chunk_tokens=8)
    folder = root / "run-1" / ref.uri
    names = objects_of(store, ref)
    name = data.draw(st.sampled_from(names))
    content = (folder / name).read_bytes()
    if damage == "flip":
        position = data.draw(st.integers(0, len(content) - 1))
        flipped = content[position] ^ data.draw(st.integers(1, 255))
        (folder / name).write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
    elif damage == "truncate":
        (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif damage == "delete":
        (folder / name).unlink()
    else:
        other = data.draw(st.sampled_from([n for n in names if (folder / n).read_bytes() != content]))
        (folder / name).write_bytes((folder / other).read_bytes())
        (folder / other).write_bytes(content)
    assert store.verify(ref) != []
    with pytest.raises(ArchiveCorrupt):
        read_all(store, ref)


def recommit(store, change):
    """Commit the archive's objects after `change` to the group: whole by its checksums, wrong by its content."""
    original = store.open(commit_routes(store, TRACES, iteration=1))
    writer = store.begin("routes", 0, {}, DIGEST)
    for stored in original.commit.objects:
        writer.write_bytes(stored.path, original.read_bytes(stored.path))
    change(zarr.open_group(writer.zarr_store("routes"), mode="r+"))
    return store.open(writer.commit())


def set_provenance(**changes):
    def change(group):
        provenance = {**group.attrs["provenance"], "iteration": 0, **changes}
        group.attrs["provenance"] = json.loads(json.dumps(provenance))

    return change


def set_array(name, index, value):
    def change(group):
        set_provenance()(group)
        group[name][index] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_provenance(run_id="another-run"),
        set_provenance(iteration=1),
        set_provenance(layers=[1, 2]),
        set_provenance(layers=[2, 1, 5]),
        set_provenance(num_experts=512),
        set_provenance(top_k=3),
        set_provenance(captured_rows=20, missing_rows=5),
        set_provenance(captured_rows=26),
        set_provenance(unknown=1),
        set_array("offsets", 1, 9),
        set_array("offsets", 4, 24),
        set_array("ids", (0, 0, 0), 16),
        set_array("ids", (0, 0), 3),
        set_array("ids", (0, 6), [1, 2, 3, 4]),
        set_array("valid", 6, True),
        lambda group: group.attrs.update({"format_version": 2}),
    ],
)
def test_an_archive_that_breaks_an_invariant_is_found(change):
    assert verify_routes(recommit(fresh_store(), change)) != []


def test_the_recommitted_archive_itself_is_sound():
    assert verify_routes(recommit(fresh_store(), set_provenance())) == []


def test_a_chunk_that_the_commit_does_not_name_is_not_read_as_zeros():
    def drop(group):
        set_provenance()(group)
        group.store._written.pop("routes/ids/c/1/0/0")

    (problem,) = verify_routes(recommit(fresh_store(), drop))
    assert "does not name routes/ids/c/1/0/0" in problem


def test_an_artifact_without_routes_is_refused(local_store):
    ref = local_store.begin("routes", 0, {}, DIGEST).commit()
    with pytest.raises(ArchiveCorrupt, match="no readable zarr group"):
        RouteArchive.open(local_store.open(ref))
