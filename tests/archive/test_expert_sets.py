import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from set_samples import local_sets, random_sets

from moe_replay.archive.expert_set_modes import GAPS, PLAIN, RANKS, RELATED
from moe_replay.archive.expert_set_ranks import MAX_SETS
from moe_replay.archive.expert_sets import decode_sets, encode_sets
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import route_dtype

SHAPES = [(16, 2), (60, 4), (64, 8), (128, 8), (256, 8), (384, 8), (512, 10), (512, 22), (1024, 1)]


def bytes_per_row(ids_RK, num_experts, **kwargs):
    return len(encode_sets(ids_RK, num_experts, **kwargs)) / len(ids_RK)


def bound(num_experts, top_k):
    return math.log2(math.comb(num_experts, top_k)) / 8


def mode_of(coded):
    return coded[0]


def round_trip(ids_RK, num_experts, keep_order=False):
    coded = encode_sets(ids_RK, num_experts, keep_order)
    decoded = decode_sets(coded, ids_RK.shape, num_experts, keep_order)
    assert decoded.dtype == ids_RK.dtype
    np.testing.assert_array_equal(decoded, ids_RK if keep_order else np.sort(ids_RK, axis=1))
    return coded


@st.composite
def routes(draw):
    """(ids, E): few or many rows, skewed, repeated or not, some missing."""
    num_experts = draw(st.one_of(st.integers(1, 40), st.integers(1, 700), st.sampled_from([256, 257, 65536])))
    top_k = draw(st.integers(1, min(40, num_experts)))
    rows = draw(st.one_of(st.integers(0, 40), st.sampled_from([2047, 2048, 2049])))
    rows = min(rows, 40) if num_experts * top_k > 10_000 else rows
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))
    weights = np.arange(1, num_experts + 1) ** -skew
    ids_RK = random_sets(rows, num_experts, top_k, draw(st.integers(0, 99)), weights)
    if draw(st.booleans()):
        ids_RK = np.concatenate([ids_RK, ids_RK[: draw(st.integers(0, rows))]])
    if top_k > 1:
        ids_RK[draw(st.lists(st.integers(0, max(0, len(ids_RK) - 1)), max_size=9)) if len(ids_RK) else []] = 0
    return ids_RK, num_experts


@settings(max_examples=60, deadline=None)
@given(routes(), st.booleans())
def test_rows_come_back_exactly(routes, keep_order):
    round_trip(*routes, keep_order)


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_uniform_sets_cost_at_most_a_twentieth_more_than_they_must(num_experts, top_k):
    coded = round_trip(random_sets(8192, num_experts, top_k), num_experts)
    assert len(coded) / 8192 <= 1.05 * bound(num_experts, top_k)


def test_uniform_sets_of_8_of_128_cost_five_and_an_eighth_bytes():
    assert bytes_per_row(random_sets(8192, 128, 8), 128) < 5.14


def test_order_costs_little_more_than_its_bits():
    ids_RK = random_sets(8192, 128, 8)
    order_bits = math.log2(math.factorial(8))
    assert bytes_per_row(ids_RK, 128, keep_order=True) <= 1.05 * (bound(128, 8) + order_bits / 8)


def test_popular_experts_make_rows_cheaper_than_equal_ones_could_be():
    ids_RK = random_sets(8192, 128, 8, weights=1 / np.arange(1, 129))
    assert mode_of(round_trip(ids_RK, 128)) == GAPS
    assert bytes_per_row(ids_RK, 128) < 0.87 * bound(128, 8)


def test_rows_that_keep_experts_of_the_one_before_are_cheaper():
    ids_RK = local_sets(4096, 64, 8, kept=5)
    assert mode_of(round_trip(ids_RK, 64)) == RELATED
    assert bytes_per_row(ids_RK, 64) < 0.75 * bound(64, 8)


def test_a_prompt_that_comes_again_costs_next_to_nothing():
    prompt_RK = random_sets(500, 128, 8)
    rows = [np.concatenate([prompt_RK, random_sets(20, 128, 8, seed=i)]) for i in range(8)]
    assert len(round_trip(np.concatenate(rows), 128)) < 1.5 * (500 + 8 * 20) * bound(128, 8)


def test_every_expert_of_every_row_costs_nothing():
    assert bytes_per_row(np.tile(np.arange(8, dtype=np.uint8), (8192, 1)), 8) < 0.02


@pytest.mark.parametrize(
    ("num_experts", "top_k", "mode"), [(128, 8, RANKS), (512, 22, GAPS), (65536, 20, GAPS), (2000, 600, GAPS)]
)
def test_the_mode_follows_from_the_shape(num_experts, top_k, mode):
    assert mode_of(round_trip(random_sets(50, num_experts, top_k), num_experts)) == mode


def test_short_sequences_that_come_again_in_any_order_are_left_to_zstd():
    sequences = random_sets(30 * 12, 16, 2).reshape(30, 12, 2)
    ids_RK = sequences[np.random.default_rng(0).integers(0, 30, 250)].reshape(-1, 2)
    coded = round_trip(ids_RK, 16)
    assert mode_of(coded) == PLAIN
    assert len(coded) < 0.6 * len(ids_RK) * bound(16, 2)


def test_a_number_of_sets_that_just_fills_a_word_is_coded_exactly():
    assert MAX_SETS > math.comb(66, 33) > MAX_SETS // 2
    ids_RK = np.concatenate([random_sets(3000, 66, 33), np.arange(33, 66, dtype=np.uint8)[None]])
    assert mode_of(round_trip(ids_RK, 66)) == RANKS


def test_missing_rows_stay_missing_and_cost_little():
    ids_RK = random_sets(8192, 128, 8)
    ids_RK[::100] = 0
    decoded = decode_sets(encode_sets(ids_RK, 128), ids_RK.shape, 128)
    np.testing.assert_array_equal(np.flatnonzero(~decoded.any(axis=1)), np.arange(0, 8192, 100))
    assert bytes_per_row(ids_RK, 128) < 1.05 * bound(128, 8)


@pytest.mark.parametrize("row", [[1, 1, 2], [0, 0, 2], [3, 16, 1], [255, 0, 1]])
def test_a_row_that_is_no_set_is_named(row):
    ids_RK = random_sets(20, 16, 3)
    ids_RK[4], ids_RK[7] = 0, row
    with pytest.raises(RoutingMismatch, match="row 7 names experts"):
        encode_sets(ids_RK, 16)


@pytest.mark.parametrize(("shape", "num_experts", "order"), [((99, 8), 128, False), ((100, 7), 128, False)])
def test_rows_of_another_shape_are_refused(shape, num_experts, order):
    coded = encode_sets(random_sets(100, 128, 8), 128)
    with pytest.raises(ArchiveCorrupt, match="expected"):
        decode_sets(coded, shape, num_experts, order)


@pytest.mark.parametrize(("num_experts", "order"), [(127, False), (128, True)])
def test_rows_of_other_settings_are_refused(num_experts, order):
    coded = encode_sets(random_sets(100, 128, 8), 128)
    with pytest.raises(ArchiveCorrupt, match="expected"):
        decode_sets(coded, (100, 8), num_experts, order)


def damaged_examples():
    skewed = 1 / np.arange(1, 65) ** 2
    examples = {
        "ranks": (random_sets(300, 128, 8), 128),
        "gaps": (random_sets(4200, 64, 4, weights=skewed), 64),
        "related": (local_sets(300, 32, 4, kept=3), 32),
        "plain": (random_sets(10, 65536, 20), 65536),
    }
    examples["ranks"][0][::7] = 0
    return [
        pytest.param(ids_RK, num_experts, order, id=f"{name}-{order}")
        for name, (ids_RK, num_experts) in examples.items()
        for order in (False, True)
    ]


def decodes_or_is_refused(data, shape, num_experts, order):
    try:
        decoded = decode_sets(data, shape, num_experts, order)
    except ArchiveCorrupt:
        return
    assert decoded.shape == shape
    assert decoded.dtype == route_dtype(num_experts)
    assert int(decoded.max()) < num_experts
    in_order_RK = np.sort(decoded[decoded.any(axis=1)].astype(np.int64), axis=1)
    assert (np.diff(in_order_RK, axis=1) > 0).all()


@pytest.mark.parametrize(("ids_RK", "num_experts", "order"), damaged_examples())
def test_damaged_bytes_give_an_error_or_sets(ids_RK, num_experts, order):
    coded = encode_sets(ids_RK, num_experts, order)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(coded)
        # Half of the damage hits the first bytes, where counts and lengths are.
        span = 150 if rng.random() < 0.5 else len(coded)
        for position in rng.integers(0, min(span, len(coded)), rng.integers(1, 4)):
            damaged[position] ^= 1 << rng.integers(0, 8)
        decodes_or_is_refused(bytes(damaged), ids_RK.shape, num_experts, order)


@pytest.mark.parametrize(("ids_RK", "num_experts", "order"), damaged_examples())
def test_truncated_and_extended_bytes_are_refused(ids_RK, num_experts, order):
    coded = encode_sets(ids_RK, num_experts, order)
    cuts = {*range(40), *np.linspace(0, len(coded) - 1, 60).astype(int).tolist()}
    for data in [*(coded[:cut] for cut in cuts), coded + b"\0", coded + b"\0\0\0\0"]:
        with pytest.raises(ArchiveCorrupt):
            decode_sets(data, ids_RK.shape, num_experts, order)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", b"\0\0", b"\1\0", b"\2\0", b"\3\0", b"\3\1"]), st.integers(0, 30))
def test_random_bytes_behind_a_header_give_an_error_or_sets(tail, start, size):
    counts = b"".join(int(number).to_bytes(4, "little") for number in (16, 4, size, size))
    decodes_or_is_refused(start + counts + tail if start else tail, (size, 4), 16, start[-1:] == b"\1")


def test_a_stream_that_claims_to_be_huge_is_not_allocated():
    coded = bytearray(encode_sets(random_sets(100, 128, 8), 128))
    coded[18:22] = b"\xfe\xff\xff\xff"
    with pytest.raises(ArchiveCorrupt, match="stream"):
        decode_sets(bytes(coded), (100, 8), 128)
