"""A real Prefect server on loopback for the tests of flows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import EXACT, run_json
from compared_runs import Compared, compare_methods
from prefect_server import serving_prefect

from moe_replay.tiny import EmbeddedAssets


@pytest.fixture(scope="session")
def prefect_api(home: Path, assets: EmbeddedAssets) -> Iterator[str]:
    """URL of the API of a Prefect server."""
    with serving_prefect(home / "prefect") as url:
        yield url


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
