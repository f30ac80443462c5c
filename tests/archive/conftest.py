import uuid

import pytest

from moe_replay.archive.artifacts import RunStore


@pytest.fixture(params=["path", "file", "memory"])
def root(request, tmp_path):
    urls = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}
    return urls[request.param]


@pytest.fixture
def store(root):
    return RunStore(root, "run-1")


@pytest.fixture
def local_store(tmp_path):
    return RunStore(str(tmp_path), "run-1")
