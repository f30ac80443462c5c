import struct
import uuid

import numpy as np
import pytest
from archive_samples import DIGEST, make_trace, origin_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.analysis import comparison
from moe_replay.analysis.agreement_figure import draw_agreement
from moe_replay.analysis.comparison import compare_routes
from moe_replay.analysis.differences import WORST
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive, token_digest, write_routes
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace

LAYERS, TOP_K = (1, 2, 5), 4


def archive_of(sequences, run_id="run-1", chunk_tokens=16, **model) -> RouteArchive:
    """An archive of (token ids, trace) pairs."""
    store = RunStore(f"memory://{uuid.uuid4().hex}", run_id)
    writer = store.begin("routes", 0, {}, DIGEST)
    routed = [(trace, token_digest(ids)) for ids, trace in sequences]
    write_routes(writer, routed, origin_of(**model), chunk_tokens)
    return RouteArchive.open(store.open(writer.commit()))


def tokens_of(name, num_tokens):
    return np.arange(num_tokens) + 1000 * name


def with_changes(trace, rows) -> RoutingTrace:
    """The trace with other experts in some (token, layer)."""
    ids_TLK = trace.ids_TLK.copy()
    for token, layer in rows:
        if trace.valid_T[token]:
            ids_TLK[token, layer] = (ids_TLK[token, layer] + 1) % trace.num_experts
    return RoutingTrace(ids_TLK, trace.valid_T, trace.num_experts, trace.layers)


@st.composite
def two_rollouts(draw):
    """Two lists of (name, trace): some shared, each with rows missing, in any order, the same tokens perhaps twice."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    rollouts = []
    for _ in range(2):
        names = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
        rollout = []
        for name in names:
            missing = draw(st.sets(st.integers(0, 9), max_size=3))
            trace = make_trace(lengths[name], seed=name, missing=missing)
            places = st.tuples(st.integers(0, max(0, lengths[name] - 1)), st.integers(0, 2))
            changed = draw(st.sets(places, max_size=4)) if lengths[name] else ()
            rollout.append((name, with_changes(trace, changed)))
        rollouts.append(rollout)
    return rollouts


def matched(a, b):
    """Places of the sequences that both have, the k-th of some tokens with the k-th."""
    places, pairs = {}, []
    for j, (name, trace) in enumerate(b):
        places.setdefault((name, trace.num_tokens), []).append(j)
    for i, (name, trace) in enumerate(a):
        if places.get((name, trace.num_tokens)):
            pairs.append((i, places[name, trace.num_tokens].pop(0)))
    return pairs


def experts_in_common(one, other, token, layer):
    return len(set(one.ids_TLK[token, layer].tolist()) & set(other.ids_TLK[token, layer].tolist()))


def names_told(rollout):
    return [(tokens_of(name, trace.num_tokens), trace) for name, trace in rollout]


@settings(max_examples=20, deadline=None)
@given(two_rollouts(), st.sampled_from([1, 8, 65536]), st.integers(0, 9))
def test_every_number_is_what_counting_one_by_one_gives(rollouts, read_tokens, prompt):
    a, b = rollouts
    pairs = matched_by_tokens(a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "READ_TOKENS", read_tokens)
        patch.setattr(comparison, "MAX_BINS", 3)
        prompts = {token_digest(ids): prompt for ids, _ in names_told(a)}
        found = compare_routes(archive_of(names_told(a)), archive_of(names_told(b), "run-2"), prompts)
    assert (found.a, found.b) == ("run-1@0", "run-2@0")
    assert found.shared_sequences == len(pairs)
    assert (found.only_a_sequences, found.only_b_sequences) == (len(a) - len(pairs), len(b) - len(pairs))
    assert found.same_tokens == (len(pairs) == len(a) == len(b))
    rows = [
        (n, t, a[i][1], b[j][1])
        for n, (i, j) in enumerate(pairs)
        for t in range(a[i][1].num_tokens)
        if a[i][1].valid_T[t] and b[j][1].valid_T[t]
    ]
    shared = {(n, t, k): experts_in_common(x, y, t, k) for n, t, x, y in rows for k in range(3)}
    assert found.compared_rows == len(rows)
    assert found.agreement == mean(count / TOP_K for count in shared.values())
    assert found.router_fraction == mean(count < TOP_K for count in shared.values())
    assert found.token_fraction == mean(any(shared[n, t, k] < TOP_K for k in range(3)) for n, t, _, _ in rows)
    assert found.prompt_agreement == mean(c / TOP_K for (_, t, _), c in shared.items() if t < prompt)
    assert found.response_agreement == mean(c / TOP_K for (_, t, _), c in shared.items() if t >= prompt)
    for k, layer in enumerate(found.layers):
        assert layer.layer == LAYERS[k]
        assert layer.agreement == mean(c / TOP_K for (_, _, at), c in shared.items() if at == k)
    firsts = {}
    for (n, t, _), count in shared.items():
        if count < TOP_K:
            firsts[n] = min(t, firsts.get(n, t))
    assert found.parting.sequences == len(firsts)
    if firsts:
        assert found.parting.positions == pytest.approx(np.quantile(list(firsts.values()), [0, 0.25, 0.5, 0.75, 1]))
    if rows:
        assert found.parting.in_prompt == sum(first < prompt for first in firsts.values())
    places = {pair: n for n, pair in enumerate(pairs)}
    assert len(found.worst) == min(WORST, len({n for n, *_ in rows}))
    assert [row.agreement for row in found.worst] == sorted(row.agreement for row in found.worst)
    for row in found.worst:
        n = places[row.sequence_a, row.sequence_b]
        assert row.agreement == mean(c / TOP_K for (at, _, _), c in shared.items() if at == n)
        assert row.first_position == firsts.get(n)
    width = found.bins.tokens_per_bin
    for k, row in enumerate(found.bins.agreement):
        for bin_, agreement in enumerate(row):
            inside = [c / TOP_K for (_, t, at), c in shared.items() if at == k and t // width == bin_]
            assert agreement == mean(inside)


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values)) if values else None


def matched_by_tokens(a, b):
    """As `matched`, with sequences of no token all alike."""
    return matched(*([(name if trace.num_tokens else -1, trace) for name, trace in rollout] for rollout in (a, b)))


TRACES = [make_trace(n, seed=n, missing=(n - 1,)) for n in (7, 1, 12, 40)]
SEQUENCES = [(tokens_of(i, trace.num_tokens), trace) for i, trace in enumerate(TRACES)]


def test_an_archive_agrees_with_itself_everywhere():
    found = compare_routes(archive_of(SEQUENCES), archive_of(SEQUENCES, chunk_tokens=65536))
    assert (found.agreement, found.router_fraction, found.token_fraction) == (1, 0, 0)
    assert found.same_tokens
    assert found.parting.sequences == 0
    assert {row.agreement for row in found.layers} == {1}
    assert {cell for row in found.bins.agreement for cell in row} == {1, None}  # the last row is missing everywhere
    assert (found.missing_a_rows, found.missing_b_rows, found.missing_both_rows) == (0, 0, 4)


def test_the_order_of_experts_makes_no_difference():
    turned = [
        (ids, RoutingTrace(np.ascontiguousarray(t.ids_TLK[..., ::-1]), t.valid_T, t.num_experts, t.layers))
        for ids, t in SEQUENCES
    ]
    assert compare_routes(archive_of(SEQUENCES), archive_of(turned)).agreement == 1


def test_sequences_are_found_by_their_tokens_in_any_order():
    found = compare_routes(archive_of(SEQUENCES), archive_of(SEQUENCES[::-1]))
    assert (found.same_tokens, found.agreement) == (True, 1)
    assert {(row.sequence_a, row.sequence_b) for row in found.worst} == {(0, 3), (2, 1), (3, 0)}


def test_where_routes_part_is_told_by_token_and_layer():
    changed = [*SEQUENCES[:2], (SEQUENCES[2][0], with_changes(TRACES[2], [(4, 1), (4, 2), (9, 0)])), SEQUENCES[3]]
    found = compare_routes(archive_of(SEQUENCES), archive_of(changed))
    assert (found.worst[0].sequence_a, found.worst[0].first_position, found.worst[0].first_layer) == (2, 4, 2)
    assert [row.first_position for row in found.layers] == [9, 4, 4]
    assert found.parting.positions == (4, 4, 4, 4, 4)
    assert found.parting.in_prompt is None


def test_archives_without_a_sequence_in_common_have_no_agreement(tmp_path):
    found = compare_routes(archive_of(SEQUENCES[:2]), archive_of(SEQUENCES[2:]))
    assert (found.shared_sequences, found.agreement, found.same_tokens) == (0, None, False)
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_agreement(found, tmp_path / "diff.png")


@pytest.mark.parametrize("other", [{"num_experts": 17}, {"top_k": 3}, {"layers": (1, 2, 6)}])
def test_archives_of_different_models_are_refused(other):
    with pytest.raises(RoutingMismatch, match=r"run-1@0 has \(experts, top_k, layers\) = \(16, 4, \(1, 2, 5\)\)"):
        compare_routes(
            archive_of(SEQUENCES), archive_of([(ids, make_trace(3, **other)) for ids in [[1, 2, 3]]], **other)
        )


def test_no_more_is_read_at_a_time_than_a_few_thousand_tokens(monkeypatch):
    monkeypatch.setattr(comparison, "READ_TOKENS", 32)
    sequences = [(tokens_of(i, 10), make_trace(10, seed=i)) for i in range(12)]
    a, b = archive_of(sequences), archive_of(sequences)
    read, most = RouteArchive.read, []

    def watched(self, tokens, layers=None):
        most.append(tokens.stop - tokens.start)
        return read(self, tokens, layers)

    monkeypatch.setattr(RouteArchive, "read", watched)
    assert compare_routes(a, b).compared_rows == 120
    assert most == [30] * 8


def test_the_heat_map_is_a_png_that_can_be_read(tmp_path):
    changed = [(ids, with_changes(trace, [(0, 0)])) for ids, trace in SEQUENCES]
    path = tmp_path / "diff.png"
    draw_agreement(compare_routes(archive_of(SEQUENCES), archive_of(changed)), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1440, 540)
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_that_cant_be_written_is_told(tmp_path):
    found = compare_routes(archive_of(SEQUENCES), archive_of(SEQUENCES))
    with pytest.raises(ConfigError, match="there is no folder"):
        draw_agreement(found, tmp_path / "nowhere" / "diff.png")
