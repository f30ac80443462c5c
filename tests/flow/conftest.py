"""A real Prefect server on loopback for the tests of flows."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import EXACT, run_json
from compared_runs import Compared, compare_methods

from moe_replay.tiny import EmbeddedAssets


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def prefect_api(home: Path, assets: EmbeddedAssets) -> Iterator[str]:
    """URL of a Prefect server's API. Stopped by its own process id."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    with (home / "prefect-server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (home / "prefect-server.log").read_text()
                assert time.monotonic() < deadline, "the Prefect server did not start within 120 s"
                time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module", autouse=True)
def prefect_for_commands(prefect_api: str) -> Iterator[None]:
    """The commands that a module's tests start use the server; other folders' tests never hear of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_api)
        yield


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Compared:
    """All methods and variants, run once for the modules that look at them."""
    return compare_methods(tmp_path_factory.mktemp("methods"), prefect_api)


@pytest.fixture(scope="session")
def exact_run(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> tuple[Path, dict[str, Any]]:
    """A run of two iterations in float32 that nothing disturbed: its folder, and what the command said."""
    root = tmp_path_factory.mktemp("undisturbed")
    return root / "exact", run_json(
        "run",
        "--run-id=exact",
        "--iterations=2",
        f"--root={root.as_uri()}",
        settings=EXACT,
        PREFECT_API_URL=prefect_api,
        MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="1",
    )
