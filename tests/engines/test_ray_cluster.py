"""Ranks and the Ray cluster they run on: one of the user's, and one of our own whose starter is killed."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from trainer import Trainer, foreign_routes
from training_calls import make_config, random_batch

from moe_replay.engines.process import EngineProcess
from moe_replay.errors import ConfigError

pytestmark = pytest.mark.slow

BATCH = random_batch(sequences=10)
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test-" + "0" * 51}


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two CPUs that somebody else has started."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's own are too long for a socket's path
        yield from serve(folder)


def serve(folder: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = [
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]
    command = [ray, "start", "--head", "--block", *options]
    with subprocess.Popen(command, env={**os.environ, **SECRET}, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout)
        started = psutil.Process(head.pid).children(recursive=True)
        yield f"127.0.0.1:{port}"
        head.terminate()
        head.communicate(timeout=60)
    assert psutil.wait_procs(started, timeout=30)[1] == []


def start(log: Path, **environment: str) -> EngineProcess:
    return EngineProcess("training_calls:Bench", (), "training", log, {"OMP_NUM_THREADS": "1", **environment})


def config_of(ranks: int):
    return make_config(rollout={"prompts": 24}, resources={"training_world_size": ranks})


def test_ranks_run_in_the_cluster_that_ray_address_names_and_leave_it_as_it_was(cluster, model, tmp_path):
    for _ in range(2):  # the second finds the room that the first has given back
        process = start(tmp_path / "training.log", RAY_ADDRESS=cluster, **SECRET)
        trainer = Trainer(process)
        trainer.open_model(model, config_of(2))
        own = [child.name() for child in psutil.Process(process.pid).children(recursive=True)]
        assert not {"raylet", "gcs_server"} & set(own)
        lengths = [len(prompt) + len(response) for prompt, response in zip(BATCH.prompts, BATCH.responses, strict=True)]
        assert trainer.step(BATCH, foreign_routes(lengths)).grad_norm > 0
        process.stop()


def test_a_cluster_without_room_for_the_ranks_is_refused(cluster, model, tmp_path):
    process = start(tmp_path / "training.log", RAY_ADDRESS=cluster, **SECRET)
    with pytest.raises(ConfigError, match=rf"= 3 takes a CPU for each, and the Ray cluster at {cluster} has 2"):
        Trainer(process).open_model(model, config_of(3))
    process.stop()


def test_an_address_where_no_cluster_is_is_refused(model, tmp_path):
    process = start(tmp_path / "training.log", RAY_ADDRESS="127.0.0.1:9", **SECRET)
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at RAY_ADDRESS = 127\.0\.0\.1:9"):
        Trainer(process).open_model(model, config_of(2))
    process.stop()


def test_ranks_and_rays_daemons_end_when_the_driver_of_their_engine_is_killed(model, tmp_path):
    program = "import sys, training_calls\nif __name__ == '__main__': training_calls.drive_ranks(*sys.argv[1:])\n"
    (tmp_path / "driver.py").write_text(program)
    command = [sys.executable, tmp_path / "driver.py", tmp_path / "training.log", model]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ranks work\n"
        started = psutil.Process(driver.pid).children(recursive=True)
        assert sum("ReplayWorker" in " ".join(process.cmdline()) for process in started) == 2
        driver.kill()
        assert psutil.wait_procs(started, timeout=20)[1] == []
