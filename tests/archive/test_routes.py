import tracemalloc
import uuid
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from archive_samples import DIGEST, batches, commit_routes, digests_of, make_trace, origin_of, same
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import FsspecStore

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.routes import RouteArchive, RoutedSequence, token_digest, verify_routes, write_routes
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace

CODECS = ["zstd", "expert-set"]
TRACES = [make_trace(n, seed=n, missing=(n - 1,)) for n in (7, 1, 12, 5)]


def fresh_store():
    return RunStore(f"memory://{uuid.uuid4().hex}", "run-1")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("keep_order", [False, True])
@settings(max_examples=25, deadline=None)
@given(batch=batches(), chunk_tokens=st.sampled_from([1, 3, 7, 65536]))
def test_routes_round_trip(codec, keep_order, batch, chunk_tokens):
    origin, traces = batch
    store = fresh_store()
    options = {"chunk_tokens": chunk_tokens, "codec": codec, "keep_order": keep_order}
    artifact = store.open(commit_routes(store, traces, origin, **options))
    archive = RouteArchive.open(artifact)
    read = archive.read_sequences(0, len(traces))
    assert len(read) == len(traces)
    assert all(same(a, b) for a, b in zip(read, traces, strict=True))
    for a, b in zip(read, traces, strict=True):
        assert np.array_equal(a.ids_TLK, b.ids_TLK if keep_order else np.sort(b.ids_TLK, axis=-1))
    assert verify_routes(artifact) == []
    archive.require_tokens(digests_of(traces))
    summary = archive.summary()
    assert (summary.codec, summary.order) == (codec, "engine" if keep_order else "ascending")
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


def test_routes_of_another_rollout_are_refused():
    wanted = ArtifactRef(uri="iterations/00000/rollout", sha256="b" * 64)
    with pytest.raises(RoutingMismatch, match=f"routes of no rollout, expected those of .*{wanted.sha256}"):
        opened_archive().require_rollout(wanted)


@pytest.mark.parametrize(
    ("layers", "positions"), [((1, 2, 5), slice(0, 3)), ((1,), slice(0, 1)), ((2, 5), slice(1, 3))]
)
def test_a_stage_of_a_pipeline_finds_its_own_layers(layers, positions):
    archive = opened_archive()
    assert archive.require_model(16, 4, layers) == positions
    assert archive.read(slice(0, 3), positions).layers == layers


@pytest.mark.parametrize(
    "model", [(17, 4, (1, 2, 5)), (16, 3, (1, 2, 5)), (16, 4, (1, 2, 6)), (16, 4, (1, 5)), (16, 4, ())]
)
def test_routes_of_another_model_are_refused(model):
    with pytest.raises(RoutingMismatch, match=r"= \(16, 4, \(1, 2, 5\)\), expected"):
        opened_archive().require_model(*model)


@pytest.mark.parametrize("other", [{"num_experts": 17}, {"top_k": 3}, {"layers": (1, 2, 6)}])
def test_a_sequence_of_another_model_is_not_archived(local_store, other):
    with pytest.raises(RoutingMismatch, match="sequence 1"):
        commit_routes(local_store, [make_trace(3), make_trace(3, **other)])


def origins(number):
    return [origin_of().model_copy(update={"gates_sha256": f"{i:064x}"}) for i in range(number)]


@st.composite
def mixed_sequences(draw):
    """Sequences with missing rows and padding whose tokens were routed under up to three versions of the weights."""
    sequences = []
    for seed, num_tokens in enumerate(draw(st.lists(st.integers(0, 8), max_size=4))):
        starts = draw(st.sets(st.integers(0, num_tokens - 1), max_size=3)) if num_tokens else set()
        changes = tuple((start, draw(st.sampled_from(origins(3)))) for start in sorted(starts))
        missing = draw(st.sets(st.integers(0, max(0, num_tokens - 1))))
        trace = make_trace(num_tokens, seed=seed, missing=missing)
        padding = draw(st.integers(0, 3)) if num_tokens else 0
        sequences.append(RoutedSequence(trace, token_digest([seed]), changes, padding))
    return sequences


def origin_per_token(sequences, default):
    for sequence in sequences:
        changes = dict(sequence.origins)
        current = default
        for token in range(sequence.trace.num_tokens):
            current = changes.get(token, current)
            yield current


@settings(max_examples=30, deadline=None)
@given(mixed_sequences(), st.sampled_from([3, 4, 100]), st.data())
def test_every_token_is_traced_to_its_origin(sequences, chunk_tokens, data):
    store, default = fresh_store(), origins(4)[3]
    writer = store.begin("routes", 0, {}, DIGEST)
    write_routes(writer, sequences, default, chunk_tokens)
    valid_T = np.concatenate([[], *(sequence.trace.valid_T for sequence in sequences)])
    artifact = store.open(writer.commit())
    archive, expected = RouteArchive.open(artifact), list(origin_per_token(sequences, default))
    assert verify_routes(artifact) == []
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
    parts = archive.origins_of(slice(start, stop))
    assert [origin for part, origin in parts for _ in range(part.start, part.stop)] == expected[start:stop]
    assert all(a[1] != b[1] and a[0].stop == b[0].start for a, b in pairwise(parts))
    for group in archive.provenance.row_groups:
        tokens = slice(group.first_token, group.first_token + group.tokens)
        assert set(expected[tokens]) == {archive.provenance.origins[group.origin]}
        assert group.captured_rows == valid_T[tokens].sum()
        assert tokens.start // chunk_tokens == (tokens.stop - 1) // chunk_tokens
    assert archive.provenance.padded_rows == sum(sequence.padded_rows for sequence in sequences)


def test_an_archive_of_one_origin_has_one_row_group_per_chunk():
    groups = opened_archive(chunk_tokens=10).provenance.row_groups
    assert [(group.first_token, group.tokens, group.missing_rows) for group in groups] == [
        (0, 10, 2),
        (10, 10, 1),
        (20, 5, 1),
    ]


@pytest.mark.parametrize("changes", [[(3, 0)], [(-1, 0)], [(2, 0), (1, 0)], [(1, 0), (1, 0)]])
def test_origins_that_change_nowhere_in_the_sequence_are_refused(local_store, changes):
    named = tuple((start, origin_of()) for start, _ in changes)
    writer = local_store.begin("routes", 0, {}, DIGEST)
    with pytest.raises(RoutingMismatch, match="origins of sequence 0 change"):
        write_routes(writer, [RoutedSequence(make_trace(3), bytes(16), named)], origin_of())


def test_weights_of_another_model_do_not_share_an_archive(local_store):
    sequence = RoutedSequence(make_trace(3), bytes(16), ((1, origin_of(top_k=3)),))
    with pytest.raises(RoutingMismatch, match="under the weights"):
        write_routes(local_store.begin("routes", 0, {}, DIGEST), [sequence], origin_of())


def test_padding_without_tokens_is_refused(local_store):
    sequence = RoutedSequence(make_trace(0), bytes(16), padded_rows=3)
    with pytest.raises(RoutingMismatch, match="3 rows of padding"):
        write_routes(local_store.begin("routes", 0, {}, DIGEST), [sequence], origin_of())


def test_a_token_digest_depends_on_order_and_not_on_dtype():
    assert token_digest(np.array([1, 2], np.int64)) == token_digest([1, 2])
    assert token_digest([1, 2]) != token_digest([2, 1])
    assert len(token_digest([])) == 16


def test_token_ids_beyond_32_bits_are_refused():
    with pytest.raises(RoutingMismatch, match="32 bits"):
        token_digest([2**31])


def test_an_artifact_without_routes_is_refused(local_store):
    ref = local_store.begin("routes", 0, {}, DIGEST).commit()
    with pytest.raises(ArchiveCorrupt, match="no readable zarr group"):
        RouteArchive.open(local_store.open(ref))


def peak_memory(root: Path, num_sequences: int) -> int:
    """Bytes held at most while an archive is written and its routes are read, a chunk of tokens at a time."""
    trace = make_trace(500, num_experts=128, top_k=8, layers=range(4))
    store = RunStore(str(root), "run-1")
    tracemalloc.start()
    writer = store.begin("routes", 0, {}, DIGEST)
    sequences = ((trace, bytes(16)) for _ in range(num_sequences))
    write_routes(writer, sequences, origin_of(128, 8, tuple(range(4))), chunk_tokens=8192, codec="zstd")
    opened = RouteArchive.open(store.open(writer.commit()))
    for rows in opened.chunks():
        opened.read(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_archive(tmp_path):
    small, large = peak_memory(tmp_path / "small", 100), peak_memory(tmp_path / "large", 400)
    more = 300 * 500 * 4 * 8
    assert large - small < more / 4, f"{small / 2**20:.0f} MiB, then {large / 2**20:.0f} for {more / 2**20:.0f} more"
