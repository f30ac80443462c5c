"""What `moe-replay plan` scales from: the archive's codecs and the fit of a predictor, for the shapes of large models.

    OMP_NUM_THREADS=1 python benchmarks/sizing.py [--chunks 4]

Routes are made up and uniform, which no codec can compress below log2 C(E, K) bits. A chunk is one layer's routes of
65536 tokens; each codec does as the archive does with it (`zstd` gets sorted rows, level 3) on one core, and takes
turns with the others. The median over chunks, and behind it half the distance between the quartiles. MB are 10^6 bytes
of raw routes. The fit is one layer's ridge regression of made-up drift of 4095 tokens, once, on as many threads as
torch takes.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from numcodecs import zstd
from rich.console import Console
from rich.table import Table

from moe_replay.analysis.measured import bound_bytes
from moe_replay.archive.expert_sets import decode_sets, encode_sets
from moe_replay.routing.fitting import Objective, RouterDrift, Weighted, fit_layer
from moe_replay.routing.trace import route_dtype

CHUNK_TOKENS, FIT_TOKENS = 65536, 4095
SHAPES = ((8, 2), (64, 8), (128, 8), (256, 8), (512, 10))
"""(E, K) of Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3, Qwen3-Next."""
ROUTERS = ((2048, 128), (4096, 128), (7168, 256))
"""(H, E) of Qwen3-30B-A3B, Qwen3-235B-A22B, DeepSeek-V3."""

Codec = tuple[str, Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4)
    chunks = parser.parse_args().chunks
    table = Table("experts", "codec", "bytes / row", "/ bound", "encode MB/s", "decode MB/s", title="uniform routes")
    for num_experts, top_k in SHAPES:
        measure_codecs(table, num_experts, top_k, chunks)
    Console(width=120).print(table)
    fits = Table("hidden size", "experts", "seconds a layer", title=f"ridge, {FIT_TOKENS} tokens")
    for hidden_size, num_experts in ROUTERS:
        fits.add_row(str(hidden_size), str(num_experts), f"{seconds_to_fit(hidden_size, num_experts):.1f}")
    Console(width=120).print(fits)


def measure_codecs(table: Table, num_experts: int, top_k: int, chunks: int) -> None:
    """A row of the table for each codec."""
    competing, dtype = codecs(num_experts, top_k), route_dtype(num_experts)
    took = {name: ([], [], []) for name, _, _ in competing}
    for seed in range(chunks + 1):
        scores_RE = np.random.default_rng(seed).random((CHUNK_TOKENS, num_experts), dtype=np.float32)
        ids_RK = np.argsort(scores_RE, axis=1)[:, :top_k].astype(dtype)
        for name, encode, decode in competing:
            times = [time.perf_counter()]
            data = encode(ids_RK)
            times.append(time.perf_counter())
            decoded_RK = decode(data)
            times.append(time.perf_counter())
            kept = ids_RK if name.endswith("kept") else np.sort(ids_RK, axis=1)
            assert np.array_equal(decoded_RK, kept), name
            if seed:  # the first compiles and fills caches
                for rates, value in zip(took[name], (len(data), *np.diff(times)), strict=True):
                    rates.append(value)
    bound = bound_bytes(num_experts, top_k)
    raw = CHUNK_TOKENS * top_k * np.dtype(dtype).itemsize / 1e6
    for name, (sizes, encoding, decoding) in took.items():
        size = float(np.median(sizes)) / CHUNK_TOKENS
        rates = (spread(raw / np.array(encoding)), spread(raw / np.array(decoding)))
        table.add_row(f"{top_k} of {num_experts}", name, f"{size:.3f}", f"{size / bound:.3f}", *rates)
    table.add_section()


def codecs(num_experts: int, top_k: int) -> list[Codec]:
    """Name, encoder and decoder of each."""
    shape, dtype = (CHUNK_TOKENS, top_k), np.dtype(route_dtype(num_experts))

    def sorted_zstd(ids_RK: np.ndarray) -> bytes:
        return zstd.compress(np.sort(ids_RK, axis=1).tobytes(), 3)

    found: list[Codec] = [
        ("zstd", sorted_zstd, lambda data: np.frombuffer(zstd.decompress(data), dtype).reshape(shape))
    ]
    for keep in (False, True):
        found.append(
            (
                "expert-set, order kept" if keep else "expert-set",
                lambda ids_RK, keep=keep: encode_sets(ids_RK, num_experts, keep),
                lambda data, keep=keep: decode_sets(data, shape, num_experts, keep),
            )
        )
    return found


def seconds_to_fit(hidden_size: int, num_experts: int) -> float:
    """Of one layer."""
    generator = torch.Generator().manual_seed(0)
    hidden_SH = torch.randn(FIT_TOKENS, hidden_size, generator=generator)
    old_SE = torch.randn(FIT_TOKENS, num_experts, generator=generator)
    new_SE = old_SE + 0.05 * torch.randn(FIT_TOKENS, num_experts, generator=generator)
    drift = RouterDrift(hidden_SH, old_SE, new_SE, torch.arange(FIT_TOKENS) % 64)
    start = time.perf_counter()
    fit_layer([Weighted(drift, 1.0)], Objective("ridge"))
    return time.perf_counter() - start


def spread(rates: np.ndarray) -> str:
    """Median and half the distance between the quartiles."""
    low, middle, high = np.percentile(rates, [25, 50, 75])
    return f"{middle:.0f} ± {(high - low) / 2:.0f}"


if __name__ == "__main__":
    main()
