import dataclasses
import io
import uuid

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive, RouteOrigin, token_digest, write_routes
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages import samples as samples_module
from moe_replay.stages.samples import Sample, read_answers, read_samples, route_origin, write_samples

LAYERS = (1, 2, 5)


def fresh_store() -> RunStore:
    return RunStore(f"memory://{uuid.uuid4().hex}", "run-1")


def origin_of(num_experts: int, top_k: int) -> RouteOrigin:
    return RouteOrigin(
        source="vllm",
        engine_version="0.28.0",
        dtype="bfloat16",
        weights_sha256="0" * 64,
        layers=LAYERS,
        num_experts=num_experts,
        top_k=top_k,
    )


def make_sample(number: int, prompt: list[int], response: list[int], num_experts=16, top_k=2, rows=None) -> Sample:
    """A sample whose routes were captured as an engine does: for every token but the last."""
    tokens = len(prompt) + len(response)
    rng = np.random.default_rng(number)
    scores_RLE = rng.random((tokens - 1 if rows is None else rows, len(LAYERS), num_experts))
    ids_RLK = np.argsort(scores_RLE, axis=-1)[..., :top_k]
    return Sample(
        sequence_id=number,
        prompt_row=7 * number,
        group=number // 2,
        data_source="moe_replay/addition",
        prompt_ids=prompt,
        response_ids=response,
        log_probs=[-0.5 * (t + 1) for t in range(len(response))],
        text="".join(map(chr, response)),
        reward=number % 2,
        truncated=number % 3 == 0,
        trace=RoutingTrace.from_capture(ids_RLK, len(ids_RLK) + 1 if rows is not None else tokens, num_experts, LAYERS),
    )


token_lists = st.lists(st.integers(0, 50_000), min_size=1, max_size=6)


@st.composite
def batches(draw):
    num_experts = draw(st.sampled_from([1, 8, 256, 257, 1024]))
    top_k = draw(st.integers(1, min(8, num_experts)))
    texts = draw(st.lists(st.tuples(token_lists, token_lists), max_size=5))
    made = [make_sample(n, prompt, response, num_experts, top_k) for n, (prompt, response) in enumerate(texts)]
    return origin_of(num_experts, top_k), made


def commit_samples(store: RunStore, samples: list[Sample], origin: RouteOrigin):
    writer = store.begin("rollout", 0, {}, "digest")
    write_samples(writer, samples)
    return store.open(writer.commit(attributes=origin.model_dump(mode="json")))


def same(a: Sample, b: Sample) -> bool:
    plain = [field.name for field in dataclasses.fields(Sample) if field.name != "trace"]
    return (
        all(getattr(a, name) == getattr(b, name) for name in plain)
        and a.trace.ids_TLK.dtype == b.trace.ids_TLK.dtype
        and np.array_equal(a.trace.ids_TLK, b.trace.ids_TLK)
        and np.array_equal(a.trace.valid_T, b.trace.valid_T)
    )


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([(1, 1 << 20), (2, 1 << 20), (4096, 1 << 20), (4096, 1), (4096, 700)]))
def test_samples_round_trip_through_any_number_of_parts(batch, bounds):
    origin, samples = batch
    part_rows, part_bytes = bounds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "PART_ROWS", part_rows)
        patch.setattr(samples_module, "PART_BYTES", part_bytes)
        artifact = commit_samples(fresh_store(), samples, origin)
    read = list(read_samples(artifact))
    parts = len(artifact.commit.objects)
    if part_bytes == 1 << 20:
        assert parts == 2 * -(-len(samples) // part_rows)
    else:
        assert parts == 2 * len(samples) if part_bytes == 1 else 2 <= parts <= 2 * len(samples)
    assert len(read) == len(samples)
    assert all(same(a, b) for a, b in zip(read, samples, strict=True))
    answers = list(read_answers(artifact))
    assert [(a.prompt_ids, a.response_ids, a.reward) for a in answers] == [
        (s.prompt_ids, s.response_ids, s.reward) for s in samples
    ]
    assert route_origin(artifact) == origin


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([3, 65536]))
def test_row_t_of_the_archive_is_the_route_of_token_t(batch, chunk_tokens):
    origin, samples = batch
    store = fresh_store()
    artifact = commit_samples(store, samples, origin)
    writer = store.begin("routes", 0, {"rollout": artifact.ref}, "digest")
    write_routes(writer, ((s.trace, s.token_digest) for s in read_samples(artifact)), origin, chunk_tokens)
    archive = RouteArchive.open(store.open(writer.commit()))
    archive.require_tokens([sample.token_digest for sample in samples])
    for sample, trace in zip(samples, archive.read_sequences(0, archive.num_sequences), strict=True):
        assert trace.num_tokens == len(sample.prompt_ids) + len(sample.response_ids)
        assert np.array_equal(trace.ids_TLK, np.sort(sample.trace.ids_TLK, axis=-1))
        # The last token was sampled and never fed: its row is missing, all others are there.
        assert trace.valid_T.tolist() == [True] * (trace.num_tokens - 1) + [False]


def test_the_digest_is_of_prompt_and_response_together():
    assert make_sample(0, [1, 2], [3]).token_digest == token_digest([1, 2, 3])


def test_log_probs_keep_the_bits_the_engine_computed_in():
    log_prob = float(np.float32(-1.2345678))
    sample = dataclasses.replace(make_sample(0, [1], [2]), log_probs=[log_prob])
    [read] = read_samples(commit_samples(fresh_store(), [sample], origin_of(16, 2)))
    assert read.log_probs == [log_prob]


@pytest.mark.parametrize("rows", [1, 5])
def test_routes_of_another_number_of_tokens_are_refused(rows):
    with pytest.raises(RoutingMismatch, match="sequence 4 has 4 tokens but routes of"):
        make_sample(4, [1, 2], [3, 4], rows=rows)


def test_log_probs_of_another_number_of_tokens_are_refused():
    with pytest.raises(RoutingMismatch, match="2 response tokens and 3 log-probs"):
        dataclasses.replace(make_sample(0, [1, 2], [3, 4]), log_probs=[-1.0, -1.0, -1.0])


def test_an_altered_object_is_found_before_it_is_parsed(tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    artifact = commit_samples(store, [make_sample(0, [1, 2], [3])], origin_of(16, 2))
    part = next(tmp_path.rglob("part-00000.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ArchiveCorrupt, match=r"part-00000\.parquet was altered"):
        list(read_samples(artifact))


@pytest.mark.parametrize("column", ["prompt_ids", "response_ids"])
def test_an_altered_token_under_a_good_checksum_is_found_by_its_digest(column):
    store, origin = fresh_store(), origin_of(16, 2)
    artifact = commit_samples(store, [make_sample(n, [1, 2], [3, 4]) for n in range(3)], origin)
    table = pq.read_table(io.BytesIO(artifact.read_bytes("part-00000.parquet")))
    rows = table.to_pylist()
    rows[1][column][0] += 1
    buffer = io.BytesIO()
    pq.write_table(table.from_pylist(rows, table.schema), buffer)
    writer = store.begin("rollout", 1, {}, "digest")
    writer.write_bytes("part-00000.parquet", buffer.getvalue())
    writer.write_bytes("captured-00000.parquet", artifact.read_bytes("captured-00000.parquet"))
    altered = store.open(writer.commit(attributes=origin.model_dump(mode="json")))
    with pytest.raises(RoutingMismatch, match="sequence 1 has tokens of digest"):
        list(read_samples(altered))
    with pytest.raises(RoutingMismatch, match="sequence 1 has tokens of digest"):
        list(read_answers(altered))


@pytest.mark.parametrize("origin", [origin_of(16, 4), origin_of(257, 2)], ids=["another top-k", "another width"])
def test_routes_under_another_models_shape_are_refused(origin):
    artifact = commit_samples(fresh_store(), [make_sample(0, [1, 2], [3, 4])], origin)
    with pytest.raises(RoutingMismatch):
        list(read_samples(artifact))


@pytest.mark.parametrize(
    ("taken", "found"),
    [([0, 2, 1], "of sequence 2 where it has tokens of sequence 1"), ([0, 1], "of none where .* of sequence 2")],
    ids=["another order", "one less"],
)
def test_routes_of_another_sequence_beside_good_tokens_are_refused(taken, found):
    store, origin = fresh_store(), origin_of(16, 2)
    artifact = commit_samples(store, [make_sample(n, [1, 2], [3, 4]) for n in range(3)], origin)
    table = pq.read_table(io.BytesIO(artifact.read_bytes("captured-00000.parquet")))
    buffer = io.BytesIO()
    pq.write_table(table.take(taken), buffer)
    writer = store.begin("rollout", 1, {}, "digest")
    writer.write_bytes("part-00000.parquet", artifact.read_bytes("part-00000.parquet"))
    writer.write_bytes("captured-00000.parquet", buffer.getvalue())
    altered = store.open(writer.commit(attributes=origin.model_dump(mode="json")))
    with pytest.raises(RoutingMismatch, match=f"has routes {found}"):
        list(read_samples(altered))
