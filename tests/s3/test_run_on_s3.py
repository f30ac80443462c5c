"""A whole run with its root on an S3 store that fails now and then."""

from pathlib import Path

import pytest
from command import SMALL, run_json
from fault_proxy import FaultProxy, at_random
from s3_server import S3Server

SETTINGS = {**SMALL, "rollout.dtype": "float32"}


@pytest.mark.slow
def test_a_run_on_a_failing_store_commits_the_bytes_of_an_undisturbed_run(
    s3_server: S3Server, proxy: FaultProxy, root: str, tmp_path: Path
) -> None:
    run = ("run", "--method=r3", "--run-id=small", "--iterations=2")

    undisturbed = run_json(*run, f"--root={tmp_path.as_uri()}", settings=SETTINGS)
    proxy.plan = at_random(0.1, seed=1)
    disturbed = run_json(*run, f"--root={root}", settings=SETTINGS)

    on_s3 = commits_below(s3_server.folder / root.removeprefix("s3://") / "small")
    assert len(on_s3) == 8
    assert on_s3 == commits_below(tmp_path / "small")
    assert disturbed["iterations"][1]["reward/mean"] == undisturbed["iterations"][1]["reward/mean"]
    failed = [one for one in proxy.exchanges if one.status is None or one.status >= 500]
    assert len(failed) > 20, "too few faults to prove anything"
    assert run_json("archive", "verify", "small", f"--root={root}")["problems"] == []


def commits_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("_committed.json")}
