"""Run the command line as a user does, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SMALL = {"rollout.prompts": 8, "rollout.responses": 4, "training.mini_steps": 2, "evaluation.samples": 1}
"""Settings of a run that is small enough to be repeated in tests."""
EXACT = {**SMALL, "rollout.dtype": "float32"}
"""Settings under which the same seed gives the same bytes."""


def arguments(*words: str, settings: dict[str, Any] | None = None) -> list[str]:
    """The command line with settings as --set."""
    sets = [f"--set={key}={value}" for key, value in (settings or {}).items()]
    return [str(Path(sys.executable).with_name("moe-replay")), *words, *sets]


def start(
    *words: str, settings: dict[str, Any] | None = None, group: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """Start a command and go on; `group` gives it a process group of its own, as a shell does."""
    return subprocess.Popen(
        arguments(*words, settings=settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
        env={**os.environ, **environment},
    )


def run_json(*words: str, settings: dict[str, Any] | None = None, **environment: str) -> dict[str, Any]:
    """Run a command with --json and return what it says; its standard error is shown when it fails."""
    process = start(*words, "--json", settings=settings, **environment)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"exit code {process.returncode}\n{err}"
    return json.loads(out)
