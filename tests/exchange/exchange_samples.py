"""Archives and imports of routes for the tests of exchange."""

import uuid

from archive_samples import DIGEST, make_trace, origin_of

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive, RoutedSequence, token_digest, verify_routes, write_routes
from moe_replay.exchange.foreign_routes import ModelShape
from moe_replay.exchange.importing import ToldOrigin, import_routes
from moe_replay.routing.trace import RoutingTrace

MODEL = ModelShape(layers=(1, 2), num_experts=16, top_k=4, decoder_layers=3)
TOLD = ToldOrigin(source="sglang", engine_version="0.5.6")
TRACES = [make_trace(n, seed=n, missing=(n - 1,)) for n in (7, 1, 12, 5)]
NEWER = origin_of().model_copy(update={"weights_sha256": "1" * 64})


def fresh_store(run_id="imported") -> RunStore:
    return RunStore(f"memory://{uuid.uuid4().hex}", run_id)


def archive_of(traces, origin=None, chunk_tokens=8, keep_order=False) -> RouteArchive:
    """An archive whose third sequence changes weights within, and came with padding."""
    store = fresh_store("run-1")
    writer = store.begin("routes", 3, {}, DIGEST)
    sequences = [RoutedSequence(trace, token_digest([i, trace.num_tokens])) for i, trace in enumerate(traces)]
    if origin is None:
        sequences[2] = sequences[2]._replace(origins=((5, NEWER),), padded_rows=6)
    write_routes(writer, sequences, origin or origin_of(), chunk_tokens, keep_order=keep_order)
    return RouteArchive.open(store.open(writer.commit()))


def imported(file, store=None, **options) -> RouteArchive:
    store = store or fresh_store()
    archive = RouteArchive.open(store.open(import_routes(store, 0, file, **options)))
    assert verify_routes(archive.artifact) == []
    return archive


def sequences_of(archive) -> list[RoutingTrace]:
    return archive.read_sequences(0, archive.num_sequences)
