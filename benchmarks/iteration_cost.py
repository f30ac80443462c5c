"""What orchestration costs an iteration: the flow beside a bare loop over the same stages on the same engines.

    python benchmarks/iteration_cost.py [--rounds 5] [--iterations 6] [--set key=value]...

Each round runs four short runs in turn, in changing order, on one pair of engines:

flow            `flows.train`: Prefect (a flow run an iteration, a task run a stage), MLflow, artifacts on disk
flow, step off  the same with rollouts beside training (rollout.one_step_off)
bare, disk      the stages' own functions called one after the other; artifacts on the same disk
bare, RAM       the same with artifacts on a file system in memory

The bare loop has no Prefect, no MLflow, no progress, no look for what is committed and no figures. It still
serialises, hashes, writes and commits each stage's artifacts, and reads and verifies them for the next stage, since
that is how stages hand over their work; `storage work` is that alone, measured by writing and reading the runs in RAM
again. Times are those between the last commits of consecutive iterations, so a run's start and end are left out.
MLflow, the results table and the start of an iteration's flow run lie beside the rollout, but in `flow, step off`.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, parse_override
from moe_replay.engines.pool import EnginePool
from moe_replay.engines.process import no_progress
from moe_replay.environment import make_home, set_defaults
from moe_replay.servers import prefect_server
from moe_replay.stages.run import Run

RAM = "/dev/shm"
STEP_OFF = "flow, step off"
Times = dict[str, list[list[float]]]
"""Seconds of each iteration by row of the table and round."""


def main() -> None:
    """Print seconds per iteration: median, and the quartiles around it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], help="a setting as key=value")
    asked = parser.parse_args()
    set_defaults()
    home = make_home()
    overrides = dict(parse_override(text) for text in asked.set)
    load = os.getloadavg()[0]
    with (
        prefect_server(home) as wait,
        tempfile.TemporaryDirectory(dir=home) as disk,
        tempfile.TemporaryDirectory(dir=RAM) as ram,
    ):
        wait()
        from tasks.engines import keeping_engines

        with keeping_engines():
            times = measure(asked.rounds, {**overrides, "iterations": asked.iterations}, disk, ram)
    print(table(times))
    print(f"load of the machine (1 minute) {load:.1f} before, {os.getloadavg()[0]:.1f} after; {os.cpu_count()} cores")


def measure(rounds: int, settings: dict[str, Any], disk: str, ram: str) -> Times:
    """The four ways in turn; a round before the first warms the engines up and is not counted."""
    ways = {"flow": disk, STEP_OFF: disk, "bare, disk": disk, "bare, RAM": ram}
    times: Times = {}
    for turn in range(-1, rounds):
        for way in sorted(ways, reverse=turn % 2 == 1):
            beside = {"rollout.one_step_off": way == STEP_OFF}
            config = load_config(None, {**settings, **beside, "storage.root": Path(ways[way]).as_uri()})
            name = f"cost-{uuid.uuid4().hex[:8]}"
            found = {"iteration": (_bare if "bare" in way else _flow)(config, name)}
            if way == "bare, RAM":
                found |= {"storage work": _store_again(RunStore(ways[way], name))}
            if turn >= 0:
                for row, seconds in found.items():
                    times.setdefault(way if row == "iteration" else row, []).append(seconds)
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return times


def _flow(config: RunConfig, name: str) -> list[float]:
    from flows.train import train

    train(config, name)
    return _between_iterations(RunStore(str(config.storage.root), name))


def _bare(config: RunConfig, name: str) -> list[float]:
    from moe_replay.preparation import prepare
    from tasks.engines import engines_of

    run = prepare(config, name, no_progress)
    pool, policy = engines_of(run), run.initial_policy
    for n in range(config.iterations):
        policy = _iterate(pool, run, n, policy)
    return _between_iterations(run.store())


def _iterate(pool: EnginePool, run: Run, n: int, policy: Any) -> Any:
    """What `flows.train.iterate` has the stages of a method without a predictor do."""
    from moe_replay.stages.routes import archive_routes

    stages = "moe_replay.stages"
    rollout = pool.rollout().call(f"{stages}.rollout:generate_rollouts", no_progress, run, n, policy)
    routes = archive_routes(run, n, rollout)
    trained = pool.training().call(f"{stages}.training:train_replayed", no_progress, run, n, policy, rollout, routes)
    pool.rollout().call(f"{stages}.evaluation:evaluate_policy", no_progress, run, n, trained)
    return trained


def last_commits(store: RunStore) -> list[float]:
    """When the last stage of each iteration was committed, in seconds since 1970."""
    return [max(s.finished.timestamp() for s in store.status(n) if s.finished) for n in store.iterations()]


def _between_iterations(store: RunStore) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(last_commits(store))]


def _store_again(source: RunStore) -> list[float]:
    """Seconds to write, commit, open and verify each iteration's artifacts, their bytes being in memory before."""
    with tempfile.TemporaryDirectory(dir=RAM) as folder:
        target = RunStore(folder, source.run_id)
        return [_copy(source, target, n) for n in source.iterations()[1:]]


def _copy(source: RunStore, target: RunStore, iteration: int) -> float:
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


def table(times: Times) -> str:
    """Rows of seconds per iteration, then what they say of each other, by round."""
    lines = [_row(name, list(itertools.chain(*rounds)), "s") for name, rounds in times.items()]
    medians = {name: [statistics.median(seconds) for seconds in rounds] for name, rounds in times.items()}
    flow, beside, disk, ram = (medians[name] for name in ("flow", STEP_OFF, "bare, disk", "bare, RAM"))
    added = [a - b for a, b in zip(flow, disk, strict=True)]
    lines.append(_row("flow - bare, disk: orchestration", added, "s"))
    lines.append(_row("bare, disk - bare, RAM", [a - b for a, b in zip(disk, ram, strict=True)], "s"))
    lines.append(_row("flow / bare, disk", [a / b for a, b in zip(flow, disk, strict=True)], ""))
    lines.append(_row("flow / bare, RAM", [a / b for a, b in zip(flow, ram, strict=True)], ""))
    lines.append(_row("flow, step off / flow", [a / b for a, b in zip(beside, flow, strict=True)], ""))
    return "\n".join(lines)


def _row(name: str, values: list[float], unit: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{name:38} {middle:6.3f} {unit:1}   [{low:.3f}, {high:.3f}] of {len(values)}"


if __name__ == "__main__":
    main()
