"""Runs of every method, which several modules look at."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import SMALL
from variants import VARIANTS

from moe_replay.archive.artifacts import RunStore
from moe_replay.reports.results import iteration_metrics


@dataclass(frozen=True)
class Compared:
    """Two iterations of every method and variant: same seed, settings and engines."""

    root: Path
    said: dict[str, Any]
    """What the comparison returned."""

    def store(self, name: str) -> RunStore:
        """The run of a method or variant."""
        return RunStore(str(self.root), name if name in VARIANTS else f"all-{name}-s0")

    def metrics(self, name: str, iteration: int) -> dict[str, float]:
        """Those of one of its iterations."""
        return iteration_metrics(self.store(name), iteration)


def compare_methods(root: Path, prefect_api: str) -> Compared:
    """Run all methods and variants, in turn, under a root."""
    program = [sys.executable, str(Path(__file__).with_name("methods_in_turn.py"))]
    environment = {**os.environ, "PREFECT_API_URL": prefect_api}
    process = subprocess.run(
        [*program, str(root), json.dumps(SMALL)], capture_output=True, text=True, timeout=800, env=environment
    )
    assert process.returncode == 0, process.stderr
    return Compared(root, json.loads(process.stdout.splitlines()[-1]))
