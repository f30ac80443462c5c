"""The cleaning flow against a real Prefect server."""

import json
import os
import subprocess
import sys
from pathlib import Path

from asking import ask

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import STAGES

CLEAN = """
import sys
from datetime import timedelta
from flows.maintenance import archive_gc
for delete in (False, True, False):
    archive_gc(sys.argv[1], grace=timedelta(0), keep_last_checkpoint=True, delete=delete)
"""


def test_gc_shows_first_and_removes_when_it_is_told_to(tmp_path: Path, prefect_api: str) -> None:
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"seed": 1})
    for iteration in range(2):
        writer = store.begin("training", iteration, {}, "d")
        writer.write_bytes("checkpoint/model", b"x" * 100)
        writer.commit()

    subprocess.run([sys.executable, "-c", CLEAN, str(tmp_path)], check=True, timeout=200, env=dict(os.environ))

    wanted = {"artifacts": {"key": {"any_": ["archive-gc"]}}, "sort": "CREATED_DESC"}
    last, second, first = ask(f"{prefect_api}/artifacts/filter", wanted)[:3]
    rows = [
        {
            "name": "run-1/iterations/00000/training/checkpoint",
            "why": "not the last checkpoint",
            "objects": 1,
            "bytes": 100,
        }
    ]
    assert [json.loads(table["data"]) for table in (first, second, last)] == [rows, rows, []]
    assert "can be removed" in first["description"]
    assert "were removed" in second["description"]
    trainings = [store.status(n)[STAGES.index("training")] for n in (0, 1)]
    assert [training.expired_bytes for training in trainings] == [100, 0]
