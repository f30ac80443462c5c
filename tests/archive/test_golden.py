"""Archives written once, kept in `golden/`, that every later version must read to the same routes.

Never written again within one format version; with a new one, call `write_golden` by hand for the new version's folder
and keep the old folder with a test that it is refused or still read.
"""

import hashlib
import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import Zstd

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.expert_sets import decode_sets
from moe_replay.archive.routes import (
    RouteArchive,
    RoutedSequence,
    RouteOrigin,
    token_digest,
    verify_routes,
    write_routes,
)
from moe_replay.routing.trace import RoutingTrace

GOLDEN = Path(__file__).parent / "golden"
COMMITS = {
    "expert-set-in-engine-order": "07b311f65bea7d841daa1ea98b2f2def218810b775557584e34aac19a14c28fc",
    "expert-set": "4aeacc0a36e94623f1ea731b933b517d05eebc6298735fa029c79a0bbde7a01f",
    "zstd": "d71664876d83097fd5c8510175ca01a57710ee2603af9d640f3f64a27310aef6",
}
LAYERS, NUM_EXPERTS, TOP_K = (1, 2, 4), 60, 4
LENGTHS = (7, 0, 1, 12)
PADDED = (5, 0, 11, 0)


def golden_ids(first: int, num_tokens: int) -> np.ndarray:
    """Ids [T, L, K] in the engine's order, distinct in each row, of tokens `first` on."""
    token, layer, place = np.meshgrid(np.arange(num_tokens) + first, np.arange(len(LAYERS)), np.arange(TOP_K))
    return ((7 * token * token + 11 * layer + 13 * place + token * layer) % NUM_EXPERTS).transpose(1, 0, 2)


def golden_tokens(number: int) -> np.ndarray:
    return 100 * number + np.arange(LENGTHS[number])


def golden_traces() -> list[RoutingTrace]:
    """The last token of each sequence is missing, and token 3 of the last sequence."""
    traces = []
    for number, num_tokens in enumerate(LENGTHS):
        ids_TLK = golden_ids(sum(LENGTHS[:number]), num_tokens).astype(np.uint8)
        valid_T = np.arange(num_tokens) < num_tokens - 1
        valid_T[3:4] &= number != 3
        ids_TLK[~valid_T] = 0
        traces.append(RoutingTrace(ids_TLK, valid_T, NUM_EXPERTS, LAYERS))
    return traces


def golden_origin(version: int) -> RouteOrigin:
    return RouteOrigin(
        source="vllm",
        engine_version="0.28.0",
        dtype="bfloat16",
        weights_sha256=hashlib.sha256(b"weights %d" % version).hexdigest(),
        gates_sha256=hashlib.sha256(b"gates %d" % version).hexdigest(),
        predictor_sha256=None,
        layers=LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
    )


def write_golden(root: Path, codec, keep_order: bool) -> ArtifactRef:
    """The last sequence went on under new weights from its token 5 on."""
    changes = [(), (), (), ((5, golden_origin(1)),)]
    sequences = [
        RoutedSequence(trace, token_digest(golden_tokens(i)), changes[i], PADDED[i])
        for i, trace in enumerate(golden_traces())
    ]
    rollout = ArtifactRef(uri="iterations/00003/rollout", sha256=hashlib.sha256(b"rollout").hexdigest())
    writer = RunStore(str(root), "golden").begin("routes", 3, {"rollout": rollout}, "config")
    provenance = write_routes(writer, sequences, golden_origin(0), 8, codec, keep_order)
    return writer.commit(attributes={"tokens": provenance.tokens, "missing_rows": provenance.missing_rows})


@pytest.mark.parametrize("name", COMMITS)
def test_the_golden_archive_is_read_to_the_same_routes(name):
    ref = ArtifactRef(uri="iterations/00003/routes", sha256=COMMITS[name])
    artifact = RunStore(str(GOLDEN / name), "golden").open(ref)
    assert verify_routes(artifact) == []
    archive = RouteArchive.open(artifact)
    archive.require_model(NUM_EXPERTS, TOP_K, LAYERS)
    archive.require_tokens([token_digest(golden_tokens(i)) for i in range(4)])
    for read, trace in zip(archive.read_sequences(0, 4), golden_traces(), strict=True):
        ordered = trace.ids_TLK if archive.provenance.order == "engine" else np.sort(trace.ids_TLK, axis=-1)
        assert np.array_equal(read.ids_TLK, ordered)
        assert np.array_equal(read.valid_T, trace.valid_T)
    origins = [golden_origin(0), golden_origin(1)]
    assert archive.origins_of(slice(0, 20)) == [(slice(0, 13), origins[0]), (slice(13, 20), origins[1])]
    assert (archive.provenance.missing_rows, archive.provenance.padded_rows) == (4, 16)


def test_a_reader_made_from_the_specification_alone_reads_the_golden_archive():
    folder = GOLDEN / "zstd/golden/iterations/00003/routes"
    document = json.loads((folder / "_committed.json").read_bytes())
    body = json.dumps(document["commit"], sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert hashlib.sha256(body.encode()).hexdigest() == document["sha256"]
    objects = {}
    for entry in document["commit"]["objects"]:
        data = (folder / entry["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
        objects[entry["path"]] = data

    def chunk(name, *index):
        metadata = json.loads(objects[f"routes/{name}/zarr.json"])
        assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "zstd", "crc32c"]
        data = objects["/".join(["routes", name, "c", *map(str, index)])]
        assert google_crc32c.value(data[:-4]) == int.from_bytes(data[-4:], "little")
        shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        values = np.frombuffer(Zstd().decode(data[:-4]), np.dtype(metadata["data_type"]).newbyteorder("<"))
        return values.reshape(shape), metadata["shape"]

    attributes = json.loads(objects["routes/zarr.json"])["attributes"]
    assert (attributes["format"], attributes["format_version"]) == ("moe-replay-routes", 1)
    (offsets, _), (digests, _) = chunk("offsets", 0), chunk("token_digests", 0, 0)
    layer = np.concatenate([chunk("ids", 2, part, 0)[0][0] for part in range(3)])[: offsets[-1]]
    valid = np.concatenate([chunk("valid", part)[0] for part in range(3)])[: offsets[-1]]
    for i, trace in enumerate(golden_traces()):
        tokens = slice(offsets[i], offsets[i + 1])
        assert np.array_equal(layer[tokens], np.sort(trace.ids_TLK[:, 2], axis=-1))
        assert np.array_equal(valid[tokens], trace.valid_T)
        ids = golden_tokens(i).astype("<i4").tobytes()
        assert digests[i].tobytes() == hashlib.blake2b(ids, digest_size=16).digest()


CODED = {"plain": 16, "ranks": 128, "gaps": 512, "related": 64}
"""Coded chunks, one for each mode of the expert-set codec, and their numbers of experts."""


@pytest.mark.parametrize("mode", CODED)
@pytest.mark.parametrize("keep_order", [False, True])
def test_each_mode_of_the_codec_reads_its_golden_chunk(mode, keep_order):
    name = f"{mode}-in-order" if keep_order else mode
    coded, ids_RK = (GOLDEN / "coded" / f"{name}.bin").read_bytes(), np.load(GOLDEN / "coded" / f"{mode}.npy")
    expected = ids_RK if keep_order else np.sort(ids_RK, axis=1)
    assert coded[0] == list(CODED).index(mode)
    assert np.array_equal(decode_sets(coded, ids_RK.shape, CODED[mode], keep_order), expected)
