"""A store whose server is killed while a run writes to it, and comes back sooner or later."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive_samples import commit_routes, make_trace
from command import EXACT, run_json, start
from s3_server import BUCKET, S3Server, environment, forget_clients, serving

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import verify_routes

KILLS = 5


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server of this test's own, to which the environment points."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with serving(tmp_path / "buckets") as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        forget_clients()
        yield server
    forget_clients()


def test_a_store_killed_again_and_again_loses_nothing_of_what_is_written(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store, trace = RunStore(f"s3://{BUCKET}/root", "run-1"), make_trace(200, missing=(199,))
    store.create_run({})
    ended, kills, folder = threading.Event(), [], server.folder / BUCKET

    def kill_between_writes() -> None:
        for _ in range(KILLS):
            before = number_of_objects(folder)
            while number_of_objects(folder) == before and not ended.is_set():
                time.sleep(0.01)
            server.kill()
            server.start()
            kills.append(before)

    killer = threading.Thread(target=kill_between_writes)
    killer.start()
    refs = []
    try:
        while len(refs) < 2 or killer.is_alive():
            refs.append(commit_routes(store, [trace], iteration=len(refs), chunk_tokens=20, codec="zstd"))
    finally:
        ended.set()
        killer.join()

    assert len(kills) == KILLS
    assert [problem for ref in refs for problem in verify_routes(store.open(ref))] == []


@pytest.mark.slow
def test_a_run_whose_store_is_killed_ends_with_an_error_that_resume_overcomes(server: S3Server, tmp_path: Path) -> None:
    words = ("run", "--method=r3", "--run-id=small", "--iterations=2")
    run_json(*words, f"--root={tmp_path.as_uri()}", settings=EXACT)
    root = f"--root=s3://{BUCKET}/root"
    folder = server.folder / BUCKET / "root/small"

    disturbed = start(
        *words, root, settings={**EXACT, "stages.retries": 0, "stages.retry_delay_seconds": 0.2}, AWS_MAX_ATTEMPTS="1"
    )
    wait_for(folder, "iterations/00000/_attempt-training-*/*")
    server.kill()
    _, told = disturbed.communicate(timeout=600)
    assert disturbed.returncode == 1, told
    assert "try again once the storage answers" in told
    assert "Traceback" not in told

    server.start()
    resumed = start("resume", "small", root, "--json")
    wait_for(folder, "iterations/00001/_attempt-training-*/*")
    # As long as it waits between two attempts at one request: what is at work goes on, once the server is back.
    server.kill()
    time.sleep(2)
    server.start()
    _, told = resumed.communicate(timeout=600)

    assert resumed.returncode == 0, told
    assert commits_below(folder) == commits_below(tmp_path / "small")
    assert run_json("archive", "verify", "small", root)["problems"] == []


def number_of_objects(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{folder}/{pattern} did not appear"
        time.sleep(0.02)


def commits_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("_committed.json")}
