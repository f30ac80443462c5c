"""Runs that are killed at random moments and resumed, until they are complete.

What is killed, when, and how the run goes on is drawn from one seed. A moment is a number of further commits and a
time after the last of them, seen in storage, so that kills fall into work however fast the machine is.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from command import EXACT
from machine import Machine, kill
from mlflow import MlflowClient

from moe_replay.archive.layout import TIMING_FILE

PATIENT = {**EXACT, "stages.retry_delay_seconds": 0.2, "stages.retries": 6}
"""Many kills of engines are survived without a resume."""
RUN_ID = "exact"

Kind = Literal["flow", "engine", "server", "everything"]
Way = Literal["resume", "run again", "fresh checkout", "none"]
KINDS: tuple[Kind, ...] = ("flow", "engine", "server", "everything")
WAYS: tuple[Way, ...] = ("resume", "run again", "fresh checkout")
"""How a run goes on whose command is gone; "none" is needed where the command lives on."""

_LONGEST_START = 12.0
"""Seconds from a command's start in which nothing is committed yet; some kills fall there."""
_LAST_RESUMES = 4
_PATIENCE = 300.0
"""Seconds without a commit or an end after which a command hangs."""


@dataclass
class Kill:
    """One kill, and what came of it."""

    kind: Kind
    at_work: str
    """The stage that was being written."""
    committed: int
    """Stages that were."""
    way: Way = "none"
    since: float = 0.0
    """When the run was resumed, or, where it went on by itself, killed."""
    seconds: float | None = None
    """From then to the first new commit; none when it was killed again before, or nothing was left to commit."""
    load: float = 0.0
    problem: str | None = None
    """Why it was not survived."""

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.1f} s"
        return f"{self.kind:10} at {self.at_work:14} then {self.way:14} {seconds:7} load {self.load:.1f}"


class KilledRun:
    """One run, from its first command until it is complete."""

    def __init__(
        self,
        machine: Machine,
        root: Path,
        settings: dict[str, Any],
        stages: int,
        rng: random.Random,
        say: Callable[[str], None] = print,
    ):
        """`stages` is the number of commits of the complete run; `say` is told of each kill."""
        self.machine, self.folder, self.rng, self.stages = machine, root / RUN_ID, rng, stages
        self.kills: list[Kill] = []
        self._seen: dict[Path, int] = {}
        self._log = root.with_suffix(".log")
        self._root = f"--root={root.as_uri()}"
        self._first = ("run", f"--run-id={RUN_ID}", self._root)
        self._settings, self._say = settings, say
        self._start(self._first)

    def go(self, kinds: Iterable[Kind]) -> None:
        """Kill at random moments and resume, for as many kills as there are kinds at most; then let the run end."""
        for kind in kinds:
            if len(self._commits()) == self.stages and self.rng.random() < 0.5:
                break
            if self._wait(*self._moment()):
                self._kill(kind, self.rng.choice(WAYS))
            elif not self._ended_well():
                self._resume(self.rng.choice(WAYS))
            else:
                return
        self.finish()

    def kill(self, kind: Kind, after: int, then: Way) -> None:
        """Kill while the stage after so many further commits is at work, and resume."""
        assert self._wait(after, self.rng.uniform(0, 0.2)), self._log.read_text()
        self._kill(kind, then)

    def finish(self) -> None:
        """Let the run end, resuming it where its command fails."""
        for _ in range(_LAST_RESUMES):
            self._wait(self.stages + 1, 0.0)
            if self._ended_well():
                return
            self._resume(self.rng.choice(WAYS))
        raise AssertionError(f"the run did not end with {_LAST_RESUMES} resumes: {self.kills[-1].problem}")

    def problems(self, undisturbed: Path, mlflow: MlflowClient, iterations: int) -> list[str]:
        """What is wrong with the run now that it is complete, beside an undisturbed one of the same seed."""
        moved = [path.parent for path, moment in self._seen.items() if path.stat().st_mtime_ns != moment]
        found = [f"{path.relative_to(self.folder)} was committed twice" for path in moved]
        ours, theirs = committed_bytes(self.folder), committed_bytes(undisturbed)
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        found += [f"{name} is not that of the undisturbed run" for name in differing[:5]]
        found += doubled_steps(mlflow, str(self.folder), iterations)
        return found + [f"{command} outlived the run" for command in self.machine.outlived()]

    def _moment(self) -> tuple[int, float]:
        """(further commits, seconds after) of the next kill."""
        left = self.stages - len(self._commits())
        if left == 0 or self.rng.random() < 0.25:
            return 0, self.rng.uniform(0, _LONGEST_START)
        return self.rng.randint(1, min(4, left)), self.rng.uniform(0, 1.0)

    def _wait(self, commits: int, seconds: float) -> bool:
        """Wait for a moment; false when the command ended before."""
        wanted, due = len(self._commits()) + commits, None
        moved = time.monotonic()
        while self._process.poll() is None:
            now, before = time.monotonic(), len(self._seen)
            done = len(self._commits())
            moved = now if done > before else moved
            last = self.kills[-1] if self.kills else None
            if last and last.seconds is None and done > last.committed:
                last.seconds = time.time() - last.since
            due = now + seconds if due is None and done >= wanted else due
            if due is not None and now >= due:
                return True
            if now - moved > _PATIENCE:
                self._fail(f"nothing was committed for {_PATIENCE:.0f} s")
                kill(self._process.pid)
            time.sleep(0.02)
        self._commits()
        return False

    def _kill(self, kind: Kind, then: Way) -> None:
        engines = self.machine.engines() if kind == "engine" else []
        if (kind == "engine" and not engines) or (kind == "server" and not self.machine.has_prefect):
            return  # none was started yet
        self.kills.append(Kill(kind, self._at_work(), len(self._commits()), since=time.time(), load=os.getloadavg()[0]))
        self._say(f"{self.folder.parent.name}: {kind} killed at {self.kills[-1].at_work}")
        if kind == "engine":
            kill(self.rng.choice(engines).pid)
            return
        if kind == "server":
            self.machine.kill_prefect()
            time.sleep(self.rng.uniform(0, 4.0))
            self.machine.restart_prefect()
            return
        if kind == "everything":
            self.machine.kill_everything(self.rng)
        else:
            kill(self._process.pid)
        self._process.wait()
        if kind == "everything":
            self.machine.restart_prefect()
        self._resume(then)

    def _ended_well(self) -> bool:
        """Whether the command ended with the run complete; it may fail only when its Prefect server was killed."""
        if self._process.returncode == 0:
            return True
        last = self.kills[-1] if self.kills else None
        if last is None or last.kind != "server" or last.way != "none":
            self._fail(f"the command ended with exit code {self._process.returncode}")
        return False

    def _resume(self, way: Way) -> None:
        if way == "fresh checkout":
            self.machine.move(shares_model=True)
        self.machine.await_prefect()
        self.kills[-1].way, self.kills[-1].since = way, time.time()
        self._start(self._first if way == "run again" else ("resume", RUN_ID, self._root))

    def _start(self, words: tuple[str, ...]) -> None:
        self._began = time.time()
        settings = self._settings if words is self._first else {}
        self._process = self.machine.start(*words, settings=settings, log=self._log)

    def _fail(self, why: str) -> None:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])
        problem = f"{why}; the end of what it said:\n{tail}"
        if not self.kills:
            raise AssertionError(problem)
        self.kills[-1].problem = problem

    def _commits(self) -> dict[Path, int]:
        """Commits and when they were written, as they were seen first."""
        for path in self.folder.glob("iterations/*/[!_]*/_committed.json"):
            self._seen.setdefault(path, path.stat().st_mtime_ns)
        return self._seen

    def _at_work(self) -> str:
        """The stage whose newest attempt this command began and did not commit."""
        try:
            found = [(path.stat().st_mtime, path) for path in self.folder.glob("iterations/*/_attempt-*")]
        except FileNotFoundError:  # it was committed just now
            return "a commit"
        mine = [path for moment, path in sorted(found) if moment >= self._began]
        return mine[-1].name.split("-")[1] if mine else "starting" if self._is_starting() else "between stages"

    def _is_starting(self) -> bool:
        return all(moment / 1e9 < self._began for moment in self._seen.values())


def committed_bytes(run: Path) -> dict[str, bytes]:
    """Every object of a run that a seed decides; not what a killed writer left, which belongs to nothing."""
    found = (path for path in (run / "iterations").glob("*/[!_]*/**/*") if path.is_file())
    files = (path for path in found if path.name != TIMING_FILE)
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def doubled_steps(client: MlflowClient, run_folder: str, iterations: int) -> list[str]:
    """What is wrong with the steps that MLflow has of the run in a folder."""
    wanted = f"tags.`moe_replay.run` LIKE 'file://{run_folder}#%'"
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, wanted)
    if len(runs) != 1:
        return [f"MLflow has {len(runs)} runs of {run_folder}"]
    found = []
    for key in runs[0].data.metrics:
        steps = sorted(point.step for point in client.get_metric_history(runs[0].info.run_id, key))
        if len(steps) > len(set(steps)) or (key == "reward/mean" and steps != list(range(iterations))):
            found.append(f"MLflow has steps {steps} of {key}")
    return found


def table(kills: list[Kill]) -> str:
    """Kills survived and tried, and the time to resume, by kind."""
    lines = [f"{'killed':12} {'tried':>5} {'survived':>8} {'to the next commit, s: median':>30} [quartiles]"]
    for kind in (*KINDS, "all"):
        ours = [one for one in kills if kind in (one.kind, "all")]
        times = sorted(one.seconds for one in ours if one.seconds is not None)
        spread = "-"
        if len(times) > 1:
            low, middle, high = statistics.quantiles(times, n=4)
            spread = f"{middle:.1f} [{low:.1f}, {high:.1f}] of {len(times)}"
        survived = sum(one.problem is None for one in ours)
        lines.append(f"{kind:12} {len(ours):5} {survived:8} {spread:>30}")
    return "\n".join(lines)
