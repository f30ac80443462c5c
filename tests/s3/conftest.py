"""An S3 server for the session, and a place of its own behind a fault proxy of its own for each test."""

import uuid
from collections.abc import Iterator

import pytest
from fault_proxy import FaultProxy, in_front_of
from s3_server import BUCKET, S3Server, environment, forget_clients, serving

from moe_replay.archive import storage_retries
from moe_replay.archive.artifacts import RunStore


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server."""
    with serving(tmp_path_factory.mktemp("s3") / "buckets") as server:
        yield server


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server, to which the environment points; waits are short."""
    monkeypatch.setattr(storage_retries, "LONGEST_FIRST_WAIT", 0.05)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with in_front_of(s3_server.port) as proxy:
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        forget_clients()
        yield proxy
    forget_clients()


@pytest.fixture
def root(proxy: FaultProxy) -> str:
    """A place in the bucket that no other test uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def store(root: str) -> RunStore:
    """A run in it."""
    return RunStore(root, "run-1")
