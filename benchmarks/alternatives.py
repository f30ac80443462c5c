"""An iteration of moe-replay against TRL's and verl's own trainers and a bare loop over the same engines, in turn.

    pip install trl                     # needed for its two rows alone; the others are measured without
    pip install TransferQueue           # likewise, for the two of verl
    OMP_NUM_THREADS=1 python benchmarks/alternatives.py [--rounds 5] [--iterations 6] [--trl-python PATH] [--set ...]

moe-replay   `flows.train`: Prefect, MLflow, every stage's artifacts checksummed and committed on disk, with optimizer
             state, so that a run resumes at any stage
bare         the same vLLM and verl engines, called one after the other (`bare_loop.py`); nothing is kept
TRL          `GRPOTrainer` set to compute the same (`trl_grpo.py` says what differs); nothing is kept
TRL, saving  the same with a checkpoint and optimizer state after each iteration
verl         `verl.trainer.main_ppo` set to compute the same (`verl_ppo.py` says what differs); nothing is kept
verl, saving  the same with verl's checkpoint after each iteration

Each round runs every way once from the same model and prompts, in rotating order; engines and TRL's process are kept
from round to round, and a round before the first warms them up; verl starts anew for each run. Times are those between
the ends of consecutive iterations of a run, so its start and end are left out. No way evaluates. moe-replay and the
bare loop sample the same tokens; TRL and verl have random numbers of their own, so tokens and rewards are told.

Where the time goes: seconds inside the engines' calls and the functions named, each without the others. `other work of
the stages` is what moe-replay's stages do beside (rewards, metrics of routing and mismatch, Parquet), in the bare loop
rewards, advantages and the pipe; verl's are its own timings, its sampling with rewards; `Prefect and all else` is what
is left of the iteration. MLflow and the results table are told while the next rollout is at work; what of them, and of
the start of the iteration's flow run, takes longer than that rollout is in `Prefect and all else`.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import bare_loop
import clocks
from iteration_cost import RAM, last_commits
from trl_grpo import GENERATE, OLD_LOG_PROBS, STEPS, Trl
from verl_ppo import ADVANTAGES, WEIGHTS, Verl

from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, parse_override
from moe_replay.engines.pool import EnginePool
from moe_replay.engines.process import no_progress
from moe_replay.environment import make_home, set_defaults
from moe_replay.servers import prefect_server
from moe_replay.stages.run import Run

OTHERS = ("TRL", "verl")
"""Trainers of others, each of them measured without and with saving."""
WRITTEN, LOADED, STORAGE = "weights written by the trainer", "weights loaded by vLLM", "storage"
STAGES, AROUND = "other work of the stages", "checks around stages"
REST = "Prefect and all else"
MLFLOW, TABLE = "beside it: MLflow", "beside it: results table"
"""While the next rollout is at work: no part of an iteration's time but where they take longer than that rollout."""
_CALL = "call"
PARTS = (GENERATE, OLD_LOG_PROBS, ADVANTAGES, STEPS, WRITTEN, LOADED, WEIGHTS, STORAGE, STAGES, AROUND)
PARTS += ("checkpoint", REST, MLFLOW, TABLE)

_STORED = {
    f"moe_replay.archive.{name}": STORAGE
    for name in (
        *(f"writing:StageWriter.{method}" for method in ("__init__", "write_bytes", "take_file", "commit")),
        *(f"reading:Artifact.{method}" for method in ("open", "found", "read_bytes", "localize", "require_present")),
        "routes:RouteArchive.open",
    )
}
_ROLLOUT = {
    "moe_replay.engines.rollout:RolloutEngine.generate": GENERATE,
    "moe_replay.engines.rollout:RolloutEngine.load": LOADED,
    "bare_loop:load_weights": LOADED,
}
_TRAINING = {
    "moe_replay.engines.training:TrainingEngine.score": OLD_LOG_PROBS,
    "moe_replay.engines.training:TrainingEngine.step": STEPS,
    "moe_replay.engines.training:TrainingEngine.save": WRITTEN,
    "bare_loop:save_weights": WRITTEN,
}
_DRIVER = {
    "moe_replay.engines.process:EngineProcess.call": _CALL,
    "moe_replay.stages.routes:archive_routes": STAGES,
    "moe_replay.stages.routes:write_routes": STORAGE,
    "tasks.stages:generate_rollouts.fn": AROUND,
    "tasks.stages:archive_routes.fn": AROUND,
    "tasks.stages:train_replayed.fn": AROUND,
}
_TELLING = {"tasks.tracking.steps:track_iteration.fn": MLFLOW, "tasks.reporting:report_results.fn": TABLE}


class Measured(NamedTuple):
    """One run."""

    seconds: list[float]
    """Of each iteration but the first."""
    parts: dict[str, float]
    """Seconds an iteration, by what they were spent on."""
    tokens: list[int]
    """Response tokens of each iteration but the first."""
    rewards: list[float]
    """Mean reward of each iteration but the first."""


def main() -> None:
    """Print seconds per iteration, ratios, and where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl and moe-replay")
    parser.add_argument("--set", action="append", default=[], help="a setting as key=value")
    asked = parser.parse_args()
    set_defaults()
    home = make_home()
    settings = dict(parse_override(text) for text in asked.set)
    load = os.getloadavg()[0]
    with (
        prefect_server(home) as wait,
        tempfile.TemporaryDirectory(dir=home) as disk,
        tempfile.TemporaryDirectory(dir=RAM) as memory,
        Trl(asked.trl_python, home / "logs" / "trl.log") as trl,
    ):
        wait()
        others = {"TRL": trl, "verl": Verl(home / "logs" / "verl.log")}
        from tasks.engines import keeping_engines

        settings |= {"iterations": asked.iterations, "evaluation.benchmarks": {}, "storage.root": Path(disk).as_uri()}
        with keeping_engines():
            measured = measure(asked.rounds, settings, others, Path(memory))
    print(report(measured))
    print(f"load of the machine (1 minute) {load:.1f} before, {os.getloadavg()[0]:.1f} after; {os.cpu_count()} cores")
    print(f"TRL {trl.version}" if trl.version else f"no TRL in {asked.trl_python}: pip install trl, and run again")
    verl = others["verl"].version
    print(f"verl {verl}" if verl else "verl's trainer needs TransferQueue: pip install TransferQueue, and run again")


def measure(
    rounds: int, settings: dict[str, Any], others: Mapping[str, Trl | Verl], memory: Path
) -> dict[str, list[Measured]]:
    """What each way took, by round."""
    configs = {method: load_config(None, {**settings, "method": method}) for method in bare_loop.METHODS}
    ways = [f"{way}, {method}" for method in configs for way in ("bare", "moe-replay")]
    ways += [way for name, other in others.items() if other.version for way in (name, f"{name}, saving")]
    measured: dict[str, list[Measured]] = {way: [] for way in ways}
    watched: set[int] = set()
    for turn in range(rounds + 1):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            name, _, variant = way.partition(", ")
            if name == "verl" and not turn:
                continue  # nothing of it is kept, so nothing can be warmed up
            run = _prepare(configs.get(variant, configs["grpo"]), watched)
            if name in others:
                found = _other(others[name], run, saves=variant == "saving")
            else:
                found = _flow(run) if name == "moe-replay" else _bare(run, memory)
            if turn:
                measured[way].append(found)
        print(f"round {turn} of {rounds}", file=sys.stderr)
    return measured


def _prepare(config: RunConfig, watched: set[int]) -> Run:
    """A new run, whose engines are started and timed."""
    from moe_replay.preparation import prepare

    run = prepare(config, f"alternatives-{uuid.uuid4().hex[:8]}", no_progress)
    for engine, functions in zip(_engines(run), (_ROLLOUT, _TRAINING), strict=True):
        if engine.pid not in watched:
            engine.call("clocks:watch", no_progress, functions | _STORED)
            watched.add(engine.pid)
    if os.getpid() not in watched:
        clocks.watch(None, None, _STORED | _DRIVER, in_threads=True)
        clocks.watch(None, None, _TELLING, whole=True)
        watched.add(os.getpid())
    return run


def _engines(run: Run) -> tuple[Any, Any]:
    from tasks.engines import engines_of

    pool = engines_of(run)
    return pool.rollout(), pool.training()


def _flow(run: Run) -> Measured:
    from flows.train import train

    _take_spans(run)
    train(run.config, run.run_id)
    here, engines = _take_spans(run)
    store = run.store()
    # When the call that committed returned: what the engine did in it and the call itself fall into one iteration.
    returned = [end for label, end, _ in here if label == _CALL]
    ended = [min(end for end in returned if end >= moment) for moment in last_commits(store)]
    told = [store.committed("rollout", n) for n in store.iterations()]
    metrics = [artifact.commit.metrics for artifact in told if artifact]
    size = run.config.rollout.prompts * run.config.rollout.responses
    tokens = [round(one["response/length"] * size) for one in metrics]
    return measured_of(ended, here, engines, tokens, [one["reward/mean"] for one in metrics])


def _bare(run: Run, memory: Path) -> Measured:
    from tasks.engines import engines_of

    pool: EnginePool = engines_of(run)
    _take_spans(run)
    told = list(bare_loop.iterate(pool, run, memory))
    here, engines = _take_spans(run)
    tokens = [one.response_tokens for one in told]
    return measured_of([one.ended for one in told], here, engines, tokens, [one.reward for one in told])


def _other(trainer: Trl | Verl, run: Run, saves: bool) -> Measured:
    told = trainer.train(run, saves)
    return measured_of(told["ended"], told["spans"], [], told["response_tokens"], told["rewards"])


def _take_spans(run: Run) -> tuple[list[clocks.Span], list[clocks.Span]]:
    """What was watched in this process, and in the engines'."""
    engines = [span for engine in _engines(run) for span in engine.call("clocks:take", no_progress)]
    return clocks.take(None, None), engines


def measured_of(
    ended: list[float], here: list[clocks.Span], engines: list[clocks.Span], tokens: list[int], rewards: list[float]
) -> Measured:
    """A run's figures from when its iterations ended; the first iteration is left out.

    The time of calls to engines is split into what the engines noted and the rest of the stages.
    """
    iterations = len(ended) - 1
    seconds = clocks.between(here, ended[0], ended[-1])
    noted = clocks.between(engines, ended[0], ended[-1])
    seconds[STAGES] = seconds.get(STAGES, 0.0) + seconds.pop(_CALL, sum(noted.values())) - sum(noted.values())
    for label, taken in noted.items():
        seconds[label] = seconds.get(label, 0.0) + taken
    seconds[REST] = ended[-1] - ended[0] - sum(taken for part, taken in seconds.items() if part not in (MLFLOW, TABLE))
    between = [later - earlier for earlier, later in itertools.pairwise(ended)]
    return Measured(between, {part: taken / iterations for part, taken in seconds.items()}, tokens[1:], rewards[1:])


def report(measured: dict[str, list[Measured]]) -> str:
    """The tables, as text."""
    lines = [f"{'':28}{'seconds an iteration':>32}   tokens   reward"]
    for way, rounds in measured.items():
        seconds = list(itertools.chain(*(one.seconds for one in rounds)))
        tokens = statistics.mean(itertools.chain(*(one.tokens for one in rounds)))
        reward = statistics.mean(itertools.chain(*(one.rewards for one in rounds)))
        lines.append(f"{way:28}{_spread(seconds):>32}{tokens:9.0f}{reward:9.3f}")
    lines += ["", f"{'':28}{'ratio, by round':>32}"]
    for way, other in pairs(list(measured)):
        ratios = [_median(a) / _median(b) for a, b in zip(measured[way], measured[other], strict=True)]
        lines.append(f"{f'{way} / {other}':38}{_spread(ratios):>22}")
    lines += ["", f"{'ms an iteration, median':32}" + "".join(f"{way:>18}" for way in measured)]
    for part in PARTS:
        cells = [statistics.median(one.parts.get(part, 0.0) for one in rounds) for rounds in measured.values()]
        if any(cells):
            lines.append(f"{part:32}" + "".join(f"{1000 * cell:18.0f}" if cell else f"{'':18}" for cell in cells))
    return "\n".join(lines)


def pairs(ways: list[str]) -> list[tuple[str, str]]:
    """Which way is compared with which."""
    wanted = [(f"moe-replay, {method}", f"bare, {method}") for method in bare_loop.METHODS]
    for name in OTHERS:
        for way in (name, f"{name}, saving"):
            wanted += [(way, "bare, grpo"), (way, "moe-replay, grpo")]
    return [(way, other) for way, other in wanted if way in ways and other in ways]


def _median(one: Measured) -> float:
    return statistics.median(one.seconds)


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
