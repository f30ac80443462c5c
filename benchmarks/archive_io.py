"""Writing and reading the routing archive of a large model, against np.savez_compressed and torch.save of the same.

    python benchmarks/archive_io.py [--tokens 1048576] [--repeat 3] [--s3]

48 MoE layers, 128 experts, top-8, uniform: nothing to exploit, the worst case for size. Every write and every read has
a process of its own, so that its peak of memory can be told; the formats take turns. Our writes hash and commit, our
reads verify checksums and invariants; the others check nothing. `--s3` adds a real S3 server (`rclone serve s3`) on
loopback, and counts requests and bytes on the wire of a partial read. MB are 10^6 bytes of raw routes, one byte an id.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "s3"))

if TYPE_CHECKING:
    from fault_proxy import FaultProxy

    from moe_replay.archive.routes import RouteArchive

LAYERS, EXPERTS, TOP_K = 48, 128, 8
SEQUENCE = 8192
PARTIAL_TOKENS = 8192
OURS = ("expert-set", "zstd")
OTHERS = ("savez_compressed", "torch.save")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("ACTION", "FORMAT", "ROOT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(_one(*asked.one, tokens=asked.tokens)))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = {"disk": str(folder / "disk")}
        proxy = None
        if asked.s3:
            from fault_proxy import FaultProxy
            from s3_server import BUCKET, environment, serving

            server = stack.enter_context(serving(folder / "s3"))
            proxy = FaultProxy(server.port)
            proxy.start()
            stack.callback(proxy.stop)
            os.environ.update(environment(server.url))
            places["S3"] = f"s3://{BUCKET}/runs"
        (folder / "disk").mkdir()
        found = _measure(places, asked.tokens, asked.repeat)
        _print(found, asked.tokens)
        if proxy is not None:
            os.environ.update(environment(proxy.url))
            _print_partial(f"{places['S3']}/0", proxy)


def _measure(places: dict[str, str], tokens: int, repeat: int) -> dict[tuple[str, str], list[dict]]:
    cases = [(form, place) for place in places for form in (*OURS, *(OTHERS if place == "disk" else ()))]
    found: dict[tuple[str, str], list[dict]] = {case: [] for case in cases}
    for turn in range(repeat):
        for form, place in cases:
            root = f"{places[place]}/{turn}"
            told = {}
            for action in ("write", "read"):
                words = [sys.executable, __file__, "--tokens", str(tokens), "--one", action, form, root]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                told |= json.loads(done.stdout)
            found[form, place].append(told)
    return found


def _one(action: str, form: str, root: str, tokens: int) -> dict[str, float]:
    """One write or read in this process: seconds, bytes, and the peak of memory over that of the imports."""
    work = {
        ("write", True): _write_ours,
        ("read", True): _read_ours,
        ("write", False): _write_other,
        ("read", False): _read_other,
    }[action, form in OURS]
    result = work(form, root, tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {f"{action}_{name}": value for name, value in {**result, "peak": peak}.items()}


def _blocks(tokens: int) -> Iterator[np.ndarray]:
    """Sequences of uniform routes, uint8 [T, L, K]: one drawn, and its experts renamed for each other."""
    drawn = np.random.default_rng(0)
    # In small parts, or the drawing would be the peak of memory.
    scores = (drawn.random((256 * LAYERS, EXPERTS), dtype=np.float32) for _ in range(SEQUENCE // 256))
    parts = [part.argpartition(TOP_K, axis=1)[:, :TOP_K].astype(np.uint8) for part in scores]
    first = np.concatenate(parts).reshape(SEQUENCE, LAYERS, TOP_K)
    for _ in range(tokens // SEQUENCE):
        yield drawn.permutation(EXPERTS).astype(np.uint8)[first]


class _Clock:
    """Seconds spent outside of the making of routes."""

    def __init__(self, tokens: int) -> None:
        self._blocks = _blocks(tokens)
        self.making = 0.0
        self._next = next(self._blocks)

    def __iter__(self) -> Iterator[np.ndarray]:
        block: np.ndarray | None = self._next
        while block is not None:
            yield block
            start = time.perf_counter()
            block = next(self._blocks, None)
            self.making += time.perf_counter() - start


def _write_ours(form: str, root: str, tokens: int) -> dict[str, float]:
    from moe_replay.archive.artifacts import RunStore
    from moe_replay.archive.routes import RouteOrigin, token_digest, write_routes
    from moe_replay.routing.trace import RoutingTrace

    store, clock, layers = RunStore(root, form), _Clock(tokens), tuple(range(LAYERS))
    origin = RouteOrigin(
        source="benchmark",
        engine_version="0",
        dtype="bfloat16",
        weights_sha256="0" * 64,
        gates_sha256="0" * 64,
        predictor_sha256=None,
        layers=layers,
        num_experts=EXPERTS,
        top_k=TOP_K,
    )
    valid_T, digest = np.ones(SEQUENCE, dtype=np.bool_), token_digest(np.arange(SEQUENCE))
    start = time.perf_counter()
    writer = store.begin("routes", 0, {}, "benchmark")
    sequences = ((RoutingTrace(ids, valid_T, EXPERTS, layers), digest) for ids in clock)
    write_routes(writer, sequences, origin, codec=form)
    ref = writer.commit()
    seconds = time.perf_counter() - start - clock.making
    return {"seconds": seconds, "bytes": store.open(ref).commit.num_bytes}


def _read_ours(form: str, root: str, tokens: int) -> dict[str, float]:
    archive = _open(root, form)
    start = time.perf_counter()
    rows = sum(archive.read(part).num_tokens for part in archive.chunks())
    assert rows == tokens
    return {"seconds": time.perf_counter() - start}


def _open(root: str, form: str) -> "RouteArchive":
    from moe_replay.archive.artifacts import RunStore
    from moe_replay.archive.routes import RouteArchive

    store = RunStore(root, form)
    ref = store.commit_of("routes", 0)
    assert ref is not None
    return RouteArchive.open(store.open(ref))


def _write_other(form: str, root: str, tokens: int) -> dict[str, float]:
    import torch

    ids_TLK, valid_T = np.concatenate(list(_blocks(tokens))), np.ones(tokens, dtype=np.bool_)
    path = Path(root) / form
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with path.open("wb") as file:
        if form == "torch.save":
            torch.save({"ids": torch.from_numpy(ids_TLK), "valid": torch.from_numpy(valid_T)}, file)
        else:
            np.savez_compressed(file, ids=ids_TLK, valid=valid_T)
        file.flush()
        os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - start, "bytes": path.stat().st_size}


def _read_other(form: str, root: str, tokens: int) -> dict[str, float]:
    import torch

    path = Path(root) / form
    start = time.perf_counter()
    if form == "torch.save":
        rows = len(torch.load(path, weights_only=True)["ids"])
    else:
        rows = len(np.load(path, allow_pickle=False)["ids"])
    assert rows == tokens
    return {"seconds": time.perf_counter() - start}


def _print(found: dict[tuple[str, str], list[dict]], tokens: int) -> None:
    raw = tokens * LAYERS * TOP_K
    table = Table(title=f"{tokens:,} tokens, {raw / 1e6:.0f} MB raw: median [least, most]", title_justify="left")
    for heading in ("format", "store", "write MB/s", "read MB/s", "bytes per (token, layer)", "peak MB write", "read"):
        table.add_column(heading, justify="left" if heading in ("format", "store") else "right", no_wrap=True)
    for (form, place), told in found.items():
        rates = [[raw / 1e6 / one[f"{action}_seconds"] for one in told] for action in ("write", "read")]
        peaks = [max(one[f"{action}_peak"] for one in told) / 1e6 for action in ("write", "read")]
        shown = [f"{statistics.median(rate):.0f} [{min(rate):.0f}, {max(rate):.0f}]" for rate in rates]
        size = told[0]["write_bytes"] / tokens / LAYERS
        table.add_row(form, place, *shown, f"{size:.3f}", *(f"{peak:.0f}" for peak in peaks))
    Console(width=120).print(table)


def _print_partial(root: str, proxy: "FaultProxy") -> None:
    """One layer of one micro-batch, as a stage of a pipeline reads it."""
    for form in OURS:
        proxy.forget()
        archive = _open(root, form)
        opened = len(proxy.of())
        archive.read(slice(0, PARTIAL_TOKENS), slice(0, 1))
        opening, reading = proxy.of()[:opened], proxy.of()[opened:]
        told = [f"{len(part)} requests, {sum(one.received for one in part):,} bytes" for part in (opening, reading)]
        whole = archive.artifact.commit.num_bytes
        share = 100 * sum(one.received for one in reading) / whole
        print(
            f"{form}: opening takes {told[0]}; {PARTIAL_TOKENS:,} tokens of one layer {told[1]}, "
            f"{share:.2f} % of the archive's {whole:,}"
        )


if __name__ == "__main__":
    main()
