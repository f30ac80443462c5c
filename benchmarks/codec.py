"""What routes cost to store and how fast: the expert-set codec beside general compressors, on one core.

    OMP_NUM_THREADS=1 python benchmarks/codec.py [--tokens N] [--layers N] [--captured ROOT RUN]

Made-up routes are top-8 of 128 experts: uniform; skewed, experts' popularity falling as 1 / sqrt(rank); local, where a
token's experts are likely to serve the next one too. A chunk is one layer's routes of 65536 tokens, as in an archive;
codecs take turns on each chunk, and what is told is the median over chunks and, after it, half the distance between the
quartiles. Chunks are made and dropped one at a time: the size of the benchmark is a matter of time, not memory.

`cost` is the seconds to encode and then upload 1 GB of raw routes at 100 MB/s and at 1 GB/s; behind the stroke, what is
left of them when chunks are encoded while others are uploaded: the larger of the two.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import blosc2
import numcodecs.zstd as zstd
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moe_replay.analysis.measured import bound_bytes
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.expert_sets import decode_sets, encode_sets
from moe_replay.archive.routes import RouteArchive

NUM_EXPERTS, TOP_K, CHUNK_TOKENS = 128, 8, 65536


@dataclass
class Codec:
    """One way to store a chunk, and what it took."""

    name: str
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, np.ndarray], np.ndarray]
    bytes: list[int] = field(default_factory=list)
    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)


def codecs(num_experts: int) -> list[Codec]:
    """All codecs; each decodes into an array like the one it is given."""
    return [
        Codec("raw", lambda ids: ids.tobytes(), _from_bytes),
        *(Codec(f"zstd {level}", _zstd(level), _from_zstd) for level in (1, 3)),
        Codec("blosc2 bitshuffle", _blosc2, lambda data, ids: _from_bytes(blosc2.decompress2(data), ids)),
        Codec("savez_compressed", _savez, lambda data, ids: np.load(io.BytesIO(data))["ids"]),
        Codec("torch.save", _torch_save, lambda data, ids: torch.load(io.BytesIO(data), weights_only=True).numpy()),
        *(_expert_sets(num_experts, keep_order) for keep_order in (False, True)),
    ]


def main() -> None:
    """Print one table for each kind of routes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2 * CHUNK_TOKENS)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--captured", nargs=2, metavar=("ROOT", "RUN"))
    asked = parser.parse_args()
    for kind, popularity, stay in (("uniform", 0.0, 0.0), ("skewed", 0.5, 0.0), ("local", 0.0, 2.5)):
        measure(kind, made_up(asked.tokens, asked.layers, popularity, stay), NUM_EXPERTS)
    if asked.captured:
        for iteration, archive in captured(*asked.captured):
            measure(f"captured, iteration {iteration}", _layers_of(archive), archive.provenance.num_experts)


def made_up(tokens: int, layers: int, popularity: float, stay: float) -> Iterator[np.ndarray]:
    """Chunks of all layers; `stay` is what serving a token adds to an expert's log odds of serving the next."""
    for layer in range(layers):
        rng = np.random.default_rng(layer)
        log_weights_E = rng.permutation(-popularity * np.log(np.arange(1, NUM_EXPERTS + 1)))
        for start in range(0, tokens, CHUNK_TOKENS):
            rows = min(CHUNK_TOKENS, tokens - start)
            yield _chunk(rng, rows, log_weights_E, stay)


def captured(root: str, run: str) -> Iterator[tuple[int, RouteArchive]]:
    """The routing archives of a run."""
    store = RunStore(root, run)
    for iteration in store.iterations():
        ref = store.commit_of("routes", iteration)
        if ref is not None:
            yield iteration, RouteArchive.open(store.open(ref))


def measure(kind: str, chunks: Iterator[np.ndarray], num_experts: int) -> None:
    """Print one table; each chunk is [rows, K]."""
    competing, rows, raw, top_k = codecs(num_experts), [], [], 1
    for ids_RK in chunks:
        rows.append(len(ids_RK))
        raw.append(ids_RK.nbytes)
        top_k = ids_RK.shape[1]
        if len(rows) == 1:
            for codec in competing:  # compiles, fills caches
                codec.decode(codec.encode(ids_RK), ids_RK)
        for codec in competing:
            _measure_chunk(codec, ids_RK)
    bound = bound_bytes(num_experts, top_k)
    title = f"{kind}: {sum(rows)} rows of {top_k} of {num_experts} experts; log2 C(E, K) is {bound:.3f} bytes"
    table = Table(
        "codec", "bytes / row", "/ bound", "encode MB/s", "decode MB/s", "cost 100 MB/s", "1 GB/s", title=title
    )
    for codec in competing:
        size = sum(codec.bytes) / sum(rows)
        seconds, left = sum(codec.encode_seconds) / sum(raw) * 1e9, sum(codec.bytes) / sum(raw)
        table.add_row(
            codec.name,
            f"{size:.3f}",
            f"{size / bound:.3f}",
            _spread(np.divide(raw, codec.encode_seconds)),
            _spread(np.divide(raw, codec.decode_seconds)),
            *(f"{seconds + upload:.1f} / {max(seconds, upload):.1f} s" for upload in (left * 10, left)),
        )
    Console(width=120).print(table)


def _measure_chunk(codec: Codec, ids_RK: np.ndarray) -> None:
    start = time.perf_counter()
    data = codec.encode(ids_RK)
    middle = time.perf_counter()
    decoded_RK = codec.decode(data, ids_RK)
    codec.decode_seconds.append(time.perf_counter() - middle)
    codec.encode_seconds.append(middle - start)
    codec.bytes.append(len(data))
    in_order = codec.name != "expert-set"
    assert np.array_equal(decoded_RK, ids_RK if in_order else np.sort(ids_RK, axis=1)), codec.name


def _spread(rates: np.ndarray) -> str:
    low, middle, high = np.percentile(rates / 1e6, [25, 50, 75])
    return f"{middle:.0f} ± {(high - low) / 2:.0f}"


def _chunk(rng: np.random.Generator, rows: int, log_weights_E: np.ndarray, stay: float) -> np.ndarray:
    ids_RK = np.empty((rows, TOP_K), dtype=np.uint8)
    block = 1 if stay else 4096
    for start in range(0, rows, block):
        scores_BE = log_weights_E + rng.gumbel(size=(min(block, rows - start), NUM_EXPERTS))
        if stay and start:
            scores_BE[0, ids_RK[start - 1]] += stay
        order_BK = np.argpartition(-scores_BE, TOP_K, axis=1)[:, :TOP_K]
        best_first = np.argsort(-np.take_along_axis(scores_BE, order_BK, axis=1), axis=1)
        ids_RK[start : start + block] = np.take_along_axis(order_BK, best_first, axis=1)
    return ids_RK


def _layers_of(archive: RouteArchive) -> Iterator[np.ndarray]:
    for layer in range(len(archive.layers)):
        for tokens in archive.chunks():
            yield np.ascontiguousarray(archive.read(tokens, slice(layer, layer + 1)).ids_TLK[:, 0])


def _from_bytes(data: bytes, ids: np.ndarray) -> np.ndarray:
    return np.frombuffer(data, dtype=ids.dtype).reshape(ids.shape).copy()


def _zstd(level: int) -> Callable[[np.ndarray], bytes]:
    return lambda ids: zstd.compress(ids, level)


def _from_zstd(data: bytes, ids: np.ndarray) -> np.ndarray:
    return _from_bytes(zstd.decompress(data), ids)


def _blosc2(ids: np.ndarray) -> bytes:
    return blosc2.compress2(
        ids, typesize=ids.itemsize, nthreads=1, codec=blosc2.Codec.ZSTD, clevel=5, filters=[blosc2.Filter.BITSHUFFLE]
    )


def _savez(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=ids)
    return buffer.getvalue()


def _torch_save(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(ids), buffer)
    return buffer.getvalue()


def _expert_sets(num_experts: int, keep_order: bool) -> Codec:
    return Codec(
        "expert-set, order kept" if keep_order else "expert-set",
        lambda ids: encode_sets(ids, num_experts, keep_order),
        lambda data, ids: decode_sets(data, ids.shape, num_experts, keep_order),
    )


if __name__ == "__main__":
    main()
