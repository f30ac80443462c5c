"""Loads read from a routing archive, and the imbalance that placements make of them."""

import tracemalloc
import uuid

import numpy as np
import pytest
from archive_samples import batches, commit_routes, make_trace, origin_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.analysis.load import micro_batch_starts, read_loads, study_loads
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace


def archive_of(traces, iteration=0, origin=None, chunk_tokens=65536) -> RouteArchive:
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run-1")
    ref = commit_routes(store, traces, origin, iteration, chunk_tokens, codec="zstd")
    return RouteArchive.open(store.open(ref))


def trace_of(rows) -> RoutingTrace:
    """One MoE layer, 4 experts; a row is the experts of a token, an empty one is missing."""
    ids_TLK = np.array([[row or (0, 0)] for row in rows], dtype=np.uint8)
    return RoutingTrace(ids_TLK, np.array([bool(row) for row in rows]), 4, (2,))


SMALL = origin_of(num_experts=4, top_k=2, layers=(2,))


@settings(max_examples=12, deadline=None)
@given(batches(), st.integers(1, 7), st.integers(1, 30))
def test_loads_are_those_of_the_captured_rows(batch, chunk_tokens, micro_batch_tokens):
    origin, traces = batch
    archive = archive_of(traces, origin=origin, chunk_tokens=chunk_tokens)
    load_MLE = read_loads(archive, micro_batch_tokens)
    expected = np.zeros((len(origin.layers), origin.num_experts), dtype=int)
    for trace in traces:
        for row_LK in trace.ids_TLK[trace.valid_T]:
            for layer, experts in enumerate(row_LK):
                expected[layer, experts] += 1
    assert load_MLE.sum(axis=0).tolist() == expected.tolist()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_micro_batches_are_whole_sequences_up_to_the_tokens_asked_for(lengths, most):
    archive = archive_of([make_trace(n, seed=n) for n in lengths])
    bounds, starts = np.cumsum([0, *lengths]), micro_batch_starts(archive, most)
    assert set(starts) <= set(bounds.tolist())
    parts = np.diff([*starts, sum(lengths)])
    assert parts.sum() == sum(lengths)
    assert all(tokens <= most or tokens in lengths for tokens in parts)
    assert all(a + b > most for a, b in zip(parts, lengths_after(starts, lengths), strict=False))


def lengths_after(starts, lengths):
    """Length of the first sequence of each micro-batch but the first."""
    firsts = {start: n for start, n in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False) if n}
    return [firsts[int(start)] for start in starts[1:]]


def test_loads_are_counted_by_micro_batch():
    traces = [trace_of([(0, 1), (0, 2), ()]), trace_of([(0, 3), ()]), trace_of([(1, 2), (1, 3)])]
    archive = archive_of(traces, origin=SMALL, chunk_tokens=2)
    assert read_loads(archive, 5)[:, 0].tolist() == [[3, 1, 1, 1], [0, 2, 1, 1]]
    assert read_loads(archive, 100)[:, 0].tolist() == [[3, 3, 2, 2]]
    assert len(read_loads(archive, 1)) == 3


def test_imbalance_is_the_most_loaded_device_over_the_mean_of_micro_batches():
    # Experts 0 and 1 of the first sequence, 0 and 2 of the second.
    archive = archive_of([trace_of([(0, 1)] * 4), trace_of([(0, 2)] * 4)], origin=SMALL)
    study = study_loads(archive, devices=2, micro_batch_tokens=4)
    assert study.micro_batches == 2
    # Devices of experts {0, 1} and {2, 3} bear 8 and 0 of 8 tokens, then 4 and 4.
    assert study.imbalance_of("linear") == 1.5
    # {0, 2} and {1, 3}: 4 and 4, then 8 and 0.
    assert study.imbalance_of("round_robin") == 1.5
    # Expert 0, whom all tokens name, beside expert 3, whom none does.
    assert study.imbalance_of("static") == 1.0
    assert study.plan.layers[0].devices == ((0, 3), (1, 2))
    assert study.imbalance_of("micro_batch") == 1.0
    assert study.load_LE == ((8, 4, 4, 0),)
    assert study.expert_imbalance_L == (2.0,)


def test_a_plan_of_the_past_is_judged_on_the_present():
    past = archive_of([trace_of([(0, 1)] * 4 + [(2, 3)])], origin=SMALL)
    now = archive_of([trace_of([(0, 2)] * 4 + [(1, 3)])], iteration=1, origin=SMALL)
    study = study_loads(now, devices=2, previous=past)
    assert study.previous_iteration == 0
    # It put experts 0 and 2 together, which bear 8 of 10 now.
    assert study.imbalance_of("previous") == 1.6
    assert study_loads(now, devices=2, previous=now).imbalance_of("previous") == study.imbalance_of("static") == 1.0


def test_what_is_planned_for_the_loads_it_serves_is_no_worse_than_round_robin():
    archive = archive_of([make_trace(40, seed=n, missing=(39,)) for n in range(8)])
    study = study_loads(archive, devices=4, slots=20, micro_batch_tokens=80)
    round_robin = study.imbalance_of("round_robin")
    assert study.imbalance_of("micro_batch", slots=16) <= round_robin
    assert study.imbalance_of("micro_batch", slots=20) <= round_robin
    one = study_loads(archive, devices=4, slots=20, micro_batch_tokens=10**6)
    assert one.imbalance_of("static") == one.imbalance_of("micro_batch") <= one.imbalance_of("round_robin")


def test_plans_without_replicas_are_left_out_where_devices_cannot_share_the_experts():
    study = study_loads(archive_of([make_trace(40)]), devices=3, slots=18)
    assert {(p.placement, p.slots) for p in study.placements} == {
        ("linear", 16),
        ("round_robin", 16),
        ("static", 18),
        ("micro_batch", 18),
    }


def test_micro_batches_without_captured_rows_do_not_count():
    archive = archive_of([trace_of([(0, 1)] * 4), trace_of([()] * 4)], origin=SMALL)
    study = study_loads(archive, devices=2, micro_batch_tokens=4)
    assert (study.micro_batches, study.tokens, study.imbalance_of("linear")) == (2, 4, 2.0)


@pytest.mark.parametrize("traces", [[], [trace_of([()] * 4)]])
def test_routes_that_were_never_captured_load_nothing(traces):
    with pytest.raises(ConfigError, match="no load to study"):
        study_loads(archive_of(traces, origin=SMALL), devices=2)


def test_micro_batches_have_room_for_a_token():
    with pytest.raises(ConfigError, match="at least 1 token"):
        study_loads(archive_of([make_trace(4)]), devices=2, micro_batch_tokens=0)


def test_a_plan_of_another_model_is_refused():
    other = archive_of([trace_of([(0, 1)])], origin=SMALL)
    with pytest.raises(RoutingMismatch, match="another model"):
        study_loads(archive_of([make_trace(4)]), devices=2, previous=other)


def test_loads_are_read_in_the_memory_of_a_chunk(tmp_path):
    def peak(num_sequences: int) -> int:
        store = RunStore(str(tmp_path / str(num_sequences)), "run-1")
        traces = (make_trace(1000, seed=n) for n in range(num_sequences))
        sequences = list(traces)
        ref = commit_routes(store, sequences, chunk_tokens=2000, codec="zstd")
        del sequences
        archive = RouteArchive.open(store.open(ref))
        read_loads(archive, 1000)
        tracemalloc.start()
        read_loads(archive, 1000)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(80) < 1.3 * peak(8)
