"""What orchestration, tracking and storage cost beside the engines, from the commits of a finished run.

    python benchmarks/iteration_cost.py RUN [--root URL]

Prefect and MLflow: the wall-clock time between the last commits of consecutive iterations, less the stages' own
time. Storage: the run's artifacts written and committed again, and read back whole with every checksum verified, on a
fresh root on the same disk. Engines: what is left of the stages' time. The first iteration, which waits for the
engines to start, is left out.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.config import RunConfig, run_root
from moe_replay.environment import set_defaults


def main() -> None:
    """Print seconds per iteration: median, and the quartiles around it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--root", default=None)
    asked = parser.parse_args()
    set_defaults()
    store = RunStore(asked.root or run_root(RunConfig()), asked.run)
    iterations = store.iterations()
    walls, stages, storages = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for previous, iteration in itertools.pairwise(iterations):
            walls.append(_finished(store, iteration) - _finished(store, previous))
            stages.append(sum(status.seconds or 0.0 for status in store.status(iteration)))
            storages.append(_store_again(store, RunStore(folder, asked.run), iteration))
    rows = {
        "iteration, wall clock": walls,
        "Prefect + MLflow": [wall - stage for wall, stage in zip(walls, stages, strict=True)],
        "storage: write, commit, read, verify": storages,
        "engines": [stage - storage for stage, storage in zip(stages, storages, strict=True)],
    }
    for name, seconds in rows.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{name:38} {middle:6.3f} s   [{low:.3f}, {high:.3f}]")


def _finished(store: RunStore, iteration: int) -> float:
    moments = [status.finished.timestamp() for status in store.status(iteration) if status.finished]
    return max(moments)


def _store_again(source: RunStore, target: RunStore, iteration: int) -> float:
    """Seconds to write, commit, open and verify the iteration's artifacts, their bytes being in memory before."""
    seconds = 0.0
    for status in source.status(iteration):
        ref = source.commit_of(status.stage, iteration)
        if ref is None:
            continue
        artifact: Artifact = source.open(ref)
        objects = {stored.path: artifact.read_bytes(stored.path) for stored in artifact.commit.objects}
        start = time.perf_counter()
        writer = target.begin(status.stage, iteration, artifact.commit.inputs, artifact.commit.config_digest)
        for path, data in objects.items():
            writer.write_bytes(path, data)
        written = target.open(writer.commit(artifact.commit.metrics, artifact.commit.attributes))
        written.localize(Path("unused"))
        seconds += time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
