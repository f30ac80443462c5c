"""Figures that `sizing` scales from, each as `docs/benchmarks.md` has it with the command that measured it.

On two shared CPU cores, on made-up routes and drift: uniform routes are the worst case for size. MB are 10^6 bytes of
raw routes, one or two bytes an expert.
"""

import math
from typing import Literal, NamedTuple

SourceCodec = Literal["expert-set", "expert-set, order kept", "zstd", "raw"]
"""How routes are stored, or not compressed at all."""


class CodecFigures(NamedTuple):
    """One codec on one shape of routes, one core."""

    num_experts: int
    top_k: int
    bytes_per_row: float
    """Of one token in one layer."""
    encode_mb_s: float
    decode_mb_s: float


class FitFigures(NamedTuple):
    """The ridge fit of one layer's predictor, one thread."""

    hidden_size: int
    num_experts: int
    tokens: int
    seconds: float


class EvolutionFigures(NamedTuple):
    """Writing and reading router evolution on a local disk, checks included."""

    stored_share: float
    """Of the raw bytes."""
    write_mb_s: float
    read_mb_s: float


CODECS: dict[SourceCodec, tuple[CodecFigures, ...]] = {
    "expert-set": (
        CodecFigures(8, 2, 0.607, 129, 208),
        CodecFigures(64, 8, 4.125, 271, 240),
        CodecFigures(128, 8, 5.125, 239, 403),
        CodecFigures(256, 8, 6.125, 73, 400),
        CodecFigures(512, 10, 8.796, 139, 267),
    ),
    "expert-set, order kept": (
        CodecFigures(8, 2, 0.803, 66, 55),
        CodecFigures(64, 8, 6.060, 65, 49),
        CodecFigures(128, 8, 7.060, 56, 39),
        CodecFigures(256, 8, 8.061, 44, 36),
        CodecFigures(512, 10, 11.549, 88, 103),
    ),
    "zstd": (
        CodecFigures(8, 2, 0.807, 65, 678),
        CodecFigures(64, 8, 5.999, 39, 1140),
        CodecFigures(128, 8, 7.002, 54, 1291),
        CodecFigures(256, 8, 8.000, 64, 9841),
        CodecFigures(512, 10, 12.590, 88, 922),
    ),
}
"""`OMP_NUM_THREADS=1 python benchmarks/sizing.py --chunks 6`; the archive's zstd gets sorted rows, sorting counted."""

ARCHIVE_MB_S: dict[SourceCodec, tuple[float, float]] = {"expert-set": (60, 77), "zstd": (61, 213)}
"""Writing and reading a whole archive on disk: `python benchmarks/archive_io.py --tokens 1048576 --repeat 3 --s3`.

8 of 128 experts, two cores; checks, hashes and what is imported on first use (about 2 s) are in it."""

RIDGE_FITS = (
    FitFigures(2048, 128, 4095, 1.1),
    FitFigures(4096, 128, 4095, 4.2),
    FitFigures(7168, 256, 4095, 13.6),
)
"""`OMP_NUM_THREADS=1 python benchmarks/sizing.py`."""

EVOLUTION = {
    "bfloat16": EvolutionFigures(135 / 168, 168 / 1.17, 168 / 0.91),
    "float32": EvolutionFigures(279 / 302, 302 / 0.81, 302 / 0.77),
}
"""8 layers, H 2048, E 128, 4096 tokens: the section on router evolution in `docs/benchmarks.md`."""


def bound_bytes(num_experts: int, top_k: int) -> float:
    """log2 C(E, K) in bytes: what a row takes at least, if all sets of experts are alike likely."""
    return math.log2(math.comb(num_experts, top_k)) / 8


def yardstick_bytes(codec: SourceCodec, num_experts: int, top_k: int) -> float:
    """What a row of uniform routes takes by the codec's nature: the set, its order besides, or each id by itself."""
    if codec == "expert-set":
        return bound_bytes(num_experts, top_k)
    if codec == "expert-set, order kept":
        return bound_bytes(num_experts, top_k) + math.log2(math.factorial(top_k)) / 8
    return top_k * (math.log2(num_experts) / 8 if codec == "zstd" else 1 if num_experts <= 256 else 2)


def nearest_figures(codec: SourceCodec, num_experts: int, top_k: int) -> CodecFigures:
    """Those of the shape whose rows carry about as much information; raises KeyError for `raw`, which costs nothing."""
    bound = bound_bytes(num_experts, top_k)
    return min(CODECS[codec], key=lambda found: abs(bound_bytes(found.num_experts, found.top_k) - bound))


def bytes_per_row(codec: SourceCodec, num_experts: int, top_k: int) -> float:
    """Stored bytes of one token in one layer, the measured excess over the yardstick taken from the nearest shape."""
    yardstick = yardstick_bytes(codec, num_experts, top_k)
    if codec == "raw":
        return yardstick
    found = nearest_figures(codec, num_experts, top_k)
    return yardstick * found.bytes_per_row / yardstick_bytes(codec, found.num_experts, found.top_k)


def ridge_seconds(hidden_size: int, num_experts: int, tokens: int) -> float:
    """Of one layer's fit: the nearest measured one, scaled by the number of operations."""
    wanted = _ridge_operations(hidden_size, num_experts, tokens)
    found = min(RIDGE_FITS, key=lambda fit: abs(math.log(_ridge_operations(*fit[:3]) / wanted)))
    return found.seconds * wanted / _ridge_operations(*found[:3])


def _ridge_operations(hidden_size: int, num_experts: int, tokens: int) -> float:
    """Second moments of the inputs, their product with the drift, Cholesky's factor, and its solutions."""
    moments = 2 * tokens * hidden_size * (hidden_size + num_experts)
    return moments + hidden_size**3 / 3 + 2 * hidden_size**2 * num_experts
