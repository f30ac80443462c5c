"""Routes and stores for the archive's tests."""

import numpy as np
from hypothesis import strategies as st

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.routes import RouteOrigin, token_digest, write_routes
from moe_replay.routing.trace import RoutingTrace, route_dtype

DIGEST = "config-digest"


def make_trace(num_tokens, num_experts=16, top_k=4, layers=(1, 2, 5), seed=0, missing=()) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    scores_TLE = rng.random((num_tokens, len(layers), num_experts))
    ids_TLK = np.argsort(scores_TLE, axis=-1)[..., :top_k].astype(route_dtype(num_experts))
    valid_T = ~np.isin(np.arange(num_tokens), list(missing))
    ids_TLK[~valid_T] = 0
    return RoutingTrace(ids_TLK, valid_T, num_experts, tuple(layers))


def origin_of(num_experts=16, top_k=4, layers=(1, 2, 5)) -> RouteOrigin:
    return RouteOrigin(
        source="vllm",
        engine_version="0.28.0",
        dtype="bfloat16",
        weights_sha256="0" * 64,
        layers=tuple(layers),
        num_experts=num_experts,
        top_k=top_k,
    )


def digests_of(traces) -> list[bytes]:
    return [token_digest(np.arange(trace.num_tokens) + i) for i, trace in enumerate(traces)]


def commit_routes(store: RunStore, traces, origin=None, iteration=0, chunk_tokens=65536, **options) -> ArtifactRef:
    writer = store.begin("routes", iteration, {}, DIGEST)
    sequences = zip(traces, digests_of(traces), strict=True)
    write_routes(writer, sequences, origin or origin_of(), chunk_tokens, **options)
    return writer.commit()


def commit_scores(store, iteration=0, data=b"scores", inputs=None, digest="d", **kwargs):
    writer = store.begin("evaluation", iteration, inputs or {}, digest)
    writer.write_bytes("scores.parquet", data)
    writer.write_bytes("parts/summary.json", b"{}")
    return writer.commit(**kwargs)


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    """Whether both name the same sets of experts for the same tokens."""
    return (
        np.array_equal(np.sort(a.ids_TLK, axis=-1), np.sort(b.ids_TLK, axis=-1))
        and a.ids_TLK.dtype == b.ids_TLK.dtype
        and np.array_equal(a.valid_T, b.valid_T)
        and (a.num_experts, a.layers) == (b.num_experts, b.layers)
    )


@st.composite
def batches(draw):
    """(origin, traces) of one rollout: ragged, missing rows anywhere, perhaps no sequence at all."""
    num_experts = draw(st.integers(1, 1024))
    top_k = draw(st.integers(1, min(16, num_experts)))
    layers = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=4)))
    traces = []
    for num_tokens in draw(st.lists(st.integers(0, 9), max_size=5)):
        missing = draw(st.sets(st.integers(0, max(0, num_tokens - 1))))
        traces.append(make_trace(num_tokens, num_experts, top_k, layers, draw(st.integers(0, 99)), missing))
    return origin_of(num_experts, top_k, layers), traces
