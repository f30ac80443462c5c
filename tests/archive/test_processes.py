"""What only separate processes can show: sudden death, and what an import pulls in."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from archive_samples import DIGEST, commit_routes, make_trace

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import verify_routes

DYING_WRITER = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import zarr
from archive_samples import commit_routes, make_trace
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.storage import Storage

writes_left = int(sys.argv[2])

def die_after(method):
    def counted(*args, **kwargs):
        global writes_left
        if writes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        writes_left -= 1
        return method(*args, **kwargs)
    return counted

for owner, name in [(Storage, "write"), (Storage, "create"), (zarr.storage.FsspecStore, "set")]:
    setattr(owner, name, die_after(getattr(owner, name)))
commit_routes(RunStore(sys.argv[1], "run-1"), [make_trace(9)], chunk_tokens=4)
"""


@pytest.mark.parametrize("writes", [0, 1, 5, 18, 25, 26])
def test_a_writer_killed_at_any_moment_leaves_nothing_visible_and_a_retry_succeeds(tmp_path, writes):
    here = str(Path(__file__).parent)
    killed = subprocess.run([sys.executable, "-c", DYING_WRITER, str(tmp_path), str(writes), here])
    assert killed.returncode == -signal.SIGKILL
    store = RunStore(str(tmp_path), "run-1")
    assert store.commit_of("routes", 0) is None
    assert store.find("routes", 0, {}, DIGEST) is None
    ref = commit_routes(store, [make_trace(9)], chunk_tokens=4)
    assert verify_routes(store.open(ref)) == []
    files = {str(path.relative_to(tmp_path / "run-1" / ref.uri)) for path in tmp_path.rglob("*") if path.is_file()}
    committed = {stored.path for stored in store.open(ref).commit.objects}
    assert files == committed | {"_committed.json", "_timing.json"}


def test_the_archive_imports_without_torch_engines_or_prefect():
    package = Path(sys.modules["moe_replay.archive.artifacts"].__file__ or "").parent
    stems = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
    modules = ["moe_replay.routing.trace", *(f"moe_replay.archive.{stem}" for stem in stems)]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'vllm', 'verl', 'ray', 'prefect'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
