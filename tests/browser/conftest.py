"""A comparison and a failed run, shown by `moe-replay ui` in a headless Chromium."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import SMALL, arguments
from page import Browser, Shown, open_browser
from prefect_server import free_port

_SETTINGS = {**SMALL, "rollout.prompts": 16, "evaluation.samples": 2}


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The addresses of both servers, over a home with a comparison of two methods by two seeds and a run that failed.

    The processes are stopped by their own ids.
    """
    home = tmp_path_factory.mktemp("shown")
    outside = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_HOME", "PREFECT_SERVER_MEMO_STORE_PATH"}
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    environment |= {"MOE_REPLAY_HOME": str(home), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
    ports = free_port(), free_port()

    def command(*words: str, settings: dict | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments(*words, settings=settings), env=environment, capture_output=True, text=True, timeout=900
        )

    words = ("compare", "--methods=grpo,r3", "--seeds=0,1", "--name=demo", "--iterations=6", "--quiet")
    done = command(*words, settings=_SETTINGS)
    assert done.returncode == 0, done.stderr
    assert (break_a_copy(home), command("resume", "demo-r3-s0", f"--root={home / 'broken'}").returncode) == (None, 1)
    options = [f"--mlflow-port={ports[0]}", f"--prefect-port={ports[1]}"]
    process = subprocess.Popen(arguments("ui", *options), stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        # A line for each server once it answers, and one that tells how to stop.
        said = [process.stdout.readline() for _ in range(3)]
        assert all(said), "the servers did not start"
        yield Shown(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", home)
    finally:
        process.terminate()
        process.wait(60)


def break_a_copy(home: Path) -> None:
    """Copy a run, without its last training, and alter the weights that this would start from."""
    run = home / "broken/demo-r3-s0"
    shutil.copytree(home / "runs/demo-r3-s0", run)
    for stage in ("training", "evaluation"):
        shutil.rmtree(run / "iterations/00005" / stage)
    weights = run / "iterations/00004/training/checkpoint/huggingface/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")


@pytest.fixture(scope="session")
def browser(shown: Shown) -> Iterator[Browser]:
    """A Chromium that keeps its screenshots in the folder SCREENSHOTS, if any."""
    folder = os.environ.get("SCREENSHOTS")
    with open_browser(shown, Path(folder) if folder else None) as opened:
        yield opened
