import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace, refuse_dead_capture, route_dtype


def routes(num_tokens, num_layers=2, num_experts=8, top_k=2, seed=0):
    scores_TLE = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return np.argsort(scores_TLE, axis=-1)[..., :top_k]


def trace_of(ids_TLK, num_experts=8):
    layers = tuple(range(ids_TLK.shape[1]))
    return RoutingTrace.from_capture(ids_TLK, len(ids_TLK), num_experts, layers)


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16)]
)
def test_ids_are_stored_as_narrow_as_the_expert_count_allows(num_experts, dtype):
    assert route_dtype(num_experts) is dtype


@pytest.mark.parametrize("num_experts", [0, -1, 65537])
def test_expert_counts_beyond_16_bits_are_refused(num_experts):
    with pytest.raises(RoutingMismatch, match=str(num_experts)):
        route_dtype(num_experts)


@given(st.integers(1, 1024), st.integers(1, 16), st.integers(0, 12), st.sampled_from([np.int16, np.int32, np.int64]))
def test_a_capture_of_all_but_the_last_token_keeps_row_t_at_token_t(num_experts, top_k, rows, dtype):
    top_k = min(top_k, num_experts)
    captured = routes(rows, 2, num_experts, top_k).astype(dtype)
    trace = RoutingTrace.from_capture(captured, rows + 1, num_experts, (3, 7))
    assert np.array_equal(trace.ids_TLK[:rows], captured)
    assert trace.ids_TLK.dtype == route_dtype(num_experts)
    assert trace.valid_T.tolist() == [True] * rows + [False]


def test_a_capture_of_all_tokens_has_no_missing_row():
    assert trace_of(routes(5)).valid_T.all()


def test_the_engines_order_of_experts_is_kept():
    trace = trace_of(np.array([[[5, 1, 3]]]))
    assert trace.ids_TLK[0, 0].tolist() == [5, 1, 3]


@pytest.mark.parametrize("rows", [0, 3, 6])
def test_a_capture_of_another_length_is_refused_with_the_numbers(rows):
    with pytest.raises(RoutingMismatch, match=rf"cover {rows} rows but the sequence has 5 tokens \(expected 4 or 5\)"):
        RoutingTrace.from_capture(routes(rows), 5, 8, (0, 1))


def test_a_capture_of_more_layers_than_the_model_has_routers_is_refused():
    with pytest.raises(RoutingMismatch, match="cover 3 layers but the model has 2"):
        RoutingTrace.from_capture(routes(5, num_layers=3), 5, 8, (0, 1))


@pytest.mark.parametrize("wrong", [-1, 8, 256, 257])
def test_an_id_outside_the_experts_is_refused_before_it_wraps_around(wrong):
    captured = routes(5)
    captured[2, 1, 0] = wrong
    with pytest.raises(RoutingMismatch, match=f"{wrong}"):
        trace_of(captured)


def test_an_id_outside_the_experts_is_refused_in_a_stored_trace():
    ids_TLK = routes(5).astype(np.uint8)
    ids_TLK[3, 1, 0] = 8
    with pytest.raises(RoutingMismatch, match="row 3, decoder layer 4 names expert 8 of 8"):
        RoutingTrace(ids_TLK, np.ones(5, bool), 8, (2, 4))


def test_an_expert_named_twice_is_refused():
    ids_TLK = routes(5, top_k=3)
    ids_TLK[4, 0] = [1, 5, 1]
    with pytest.raises(RoutingMismatch, match=r"row 4, decoder layer 0 names an expert twice: \[1, 5, 1\]"):
        trace_of(ids_TLK)


def test_a_missing_row_that_names_experts_is_refused():
    ids_TLK = np.zeros((2, 1, 2), np.uint8)
    ids_TLK[1, 0] = [0, 1]
    with pytest.raises(RoutingMismatch, match="row 1 is marked missing"):
        RoutingTrace(ids_TLK, np.zeros(2, bool), 8, (0,))


@pytest.mark.parametrize("layers", [(), (1, 1), (2, 1), (-1, 0)])
def test_a_layer_map_that_is_not_ascending_is_refused(layers):
    with pytest.raises(RoutingMismatch, match="layer map"):
        RoutingTrace(np.zeros((0, len(layers), 2), np.uint8), np.zeros(0, bool), 8, layers)


@pytest.mark.parametrize(
    ("ids_TLK", "valid_T"),
    [
        (np.zeros((0, 2, 2), np.uint16), np.zeros(0, bool)),
        (np.zeros((0, 2, 2), np.int64), np.zeros(0, bool)),
        (np.zeros((0, 2, 9), np.uint8), np.zeros(0, bool)),
        (np.zeros((0, 2, 0), np.uint8), np.zeros(0, bool)),
        (np.zeros((0, 3, 2), np.uint8), np.zeros(0, bool)),
        (np.zeros((0, 4), np.uint8), np.zeros(0, bool)),
        (np.zeros((0, 2, 2), np.uint8), np.zeros(1, bool)),
        (np.zeros((0, 2, 2), np.uint8), np.zeros(0, np.uint8)),
    ],
)
def test_shapes_and_dtypes_other_than_the_models_are_refused(ids_TLK, valid_T):
    with pytest.raises(RoutingMismatch):
        RoutingTrace(ids_TLK, valid_T, 8, (0, 1))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_concatenated_traces_come_apart_by_slicing(lengths):
    traces = [RoutingTrace.from_capture(routes(n, seed=n), n + 1, 8, (0, 1)) for n in lengths]
    whole, start = RoutingTrace.concatenate(traces), 0
    for trace in traces:
        part = whole.slice_tokens(start, start + trace.num_tokens)
        assert np.array_equal(part.ids_TLK, trace.ids_TLK)
        assert np.array_equal(part.valid_T, trace.valid_T)
        start += trace.num_tokens
    assert start == whole.num_tokens


def test_traces_of_two_models_do_not_concatenate():
    with pytest.raises(RoutingMismatch, match="trace 1 has"):
        RoutingTrace.concatenate([trace_of(routes(3)), trace_of(routes(3), num_experts=9)])


def test_layers_are_selected_by_decoder_layer_index():
    trace = RoutingTrace.from_capture(routes(5, num_layers=3), 5, 8, (2, 4, 9))
    chosen = trace.select_layers([4, 9])
    assert chosen.layers == (4, 9)
    assert np.array_equal(chosen.ids_TLK, trace.ids_TLK[:, 1:])


def test_a_layer_that_is_not_in_the_trace_is_refused():
    with pytest.raises(RoutingMismatch, match=r"\[3\]"):
        trace_of(routes(5)).select_layers([0, 3])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_token_ranges_outside_the_trace_are_refused(start, stop):
    with pytest.raises(RoutingMismatch, match="leave a trace of 5"):
        trace_of(routes(5)).slice_tokens(start, stop)


def test_an_all_zero_capture_is_refused():
    with pytest.raises(RoutingMismatch, match="never captured"):
        trace_of(np.zeros((4, 2, 2), int))


def test_an_all_zero_capture_of_top_1_routes_is_refused():
    with pytest.raises(RoutingMismatch, match="bypasses route capture"):
        refuse_dead_capture([trace_of(np.zeros((64, 2, 1), int))])


def test_a_capture_that_repeats_one_row_for_all_tokens_is_refused():
    with pytest.raises(RoutingMismatch, match="bypasses route capture"):
        refuse_dead_capture([trace_of(np.repeat(routes(1), 100, axis=0))])


def test_missing_rows_do_not_hide_a_dead_capture():
    sequences = [RoutingTrace.from_capture(np.repeat(routes(1), 20, axis=0), 21, 8, (0, 1)) for _ in range(5)]
    with pytest.raises(RoutingMismatch, match="all 100 captured tokens"):
        refuse_dead_capture(sequences)


def test_a_live_capture_passes():
    refuse_dead_capture([trace_of(routes(100))])


def test_sequences_that_differ_from_each_other_alone_pass():
    refuse_dead_capture([trace_of(np.repeat(routes(1), 50, axis=0)), trace_of(np.repeat(routes(2)[1:], 50, axis=0))])


def test_one_collapsed_router_among_live_ones_passes():
    ids_TLK = routes(100)
    ids_TLK[:, 0] = [3, 1]
    refuse_dead_capture([trace_of(ids_TLK)])


def test_a_model_of_one_collapsed_router_passes():
    refuse_dead_capture([trace_of(np.repeat(routes(1, num_layers=1), 100, axis=0))])


def test_a_model_that_uses_every_expert_passes():
    refuse_dead_capture([trace_of(np.tile([0, 1], (100, 2, 1)), num_experts=2)])


def test_few_equal_tokens_are_not_judged():
    refuse_dead_capture([trace_of(np.repeat(routes(1), 63, axis=0))])


def test_an_empty_trace_is_not_judged():
    refuse_dead_capture([trace_of(np.zeros((0, 2, 2), int))])


def test_ascending_keeps_the_sets_and_the_missing_rows():
    ids_TLK = np.array([[[3, 1]], [[0, 2]], [[0, 0]]], dtype=np.uint8)
    trace = RoutingTrace(ids_TLK, np.array([True, True, False]), 4, (0,))
    assert trace.ascending().ids_TLK.tolist() == [[[1, 3]], [[0, 2]], [[0, 0]]]
    assert trace.ascending().valid_T.tolist() == [True, True, False]
