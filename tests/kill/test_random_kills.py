"""Kill anything at any moment: small runs of two methods against undisturbed ones of the same seed."""

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
from kills import KINDS, PATIENT, RUN_ID, Kill, KilledRun, table
from machine import Machine
from mlflow import MlflowClient

from moe_replay.tiny import EmbeddedAssets

ITERATIONS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "r3": {**PATIENT, "method": "r3", "iterations": ITERATIONS},
    # By its defaults PR2 uses no predictor so early.
    "pr2": {
        **PATIENT,
        "method": "pr2",
        "iterations": ITERATIONS,
        "predictor.judged_on": "held_out",
        "predictor.held_out": 0.5,
        "predictor.evidence": 0.0,
    },
}
STAGES = {"r3": 4 * ITERATIONS, "pr2": 5 * ITERATIONS}


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_runs_killed_at_random_moments_end_with_the_bytes_of_undisturbed_ones(
    request: pytest.FixtureRequest, home: Path, assets: EmbeddedAssets, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    number, seed = request.config.getoption("--kills"), request.config.getoption("--kill-seed")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    rng = random.Random(seed)
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow = MlflowClient(tracking)
    machine = Machine(tmp_path, home / "embedded", tracking)

    def say(what: str) -> None:
        with capsys.disabled():
            print(what, flush=True)

    say(f"\n{number} kills, --kill-seed={seed}")
    for method in STAGES:
        words = ("run", f"--run-id={RUN_ID}", f"--root={(tmp_path / method).as_uri()}")
        undisturbed = machine.start(*words, settings=SETTINGS[method], log=tmp_path / f"{method}.log")
        assert undisturbed.wait(1200) == 0, (tmp_path / f"{method}.log").read_text()
    kills: list[Kill] = []
    broken: list[str] = []
    for life, method in enumerate(itertools.cycle(STAGES)):
        if life % 4 >= 2:
            machine.share_prefect()
        try:
            run = KilledRun(machine, tmp_path / f"life-{life}", SETTINGS[method], STAGES[method], rng, say)
            run.go(rng.choice(KINDS) for _ in range(number - len(kills)))
        finally:
            machine.stop_sharing_prefect()
        problems = run.problems(tmp_path / method / RUN_ID, mlflow, ITERATIONS)
        for one in run.kills:
            one.problem = one.problem or ("; ".join(problems) or None)
            seconds = "-" if one.seconds is None else f"{one.seconds:.1f} s"
            say(
                f"life {life} {method:4} {one.kind:10} at {one.at_work:14} {one.way:14} {seconds:7} load {one.load:.1f}"
            )
        broken += [one.problem for one in run.kills if one.problem]
        kills += run.kills
        if len(kills) >= number:
            break
    say(table(kills))

    assert broken == [], f"{len(broken)} of {len(kills)} kills were not survived (seed {seed}, {os.cpu_count()} cores)"
