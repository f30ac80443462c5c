"""Scratch folders go, however their user ends."""

import subprocess
import sys
from pathlib import Path

from moe_replay.stages.scratch import scratch_folder

HOLDER = """
import sys, time
from pathlib import Path
from moe_replay.stages.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_scratch_folder_is_new_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "scratch") as one, scratch_folder(tmp_path / "scratch") as other:
        assert one != other
        assert list(one.iterdir()) == []
        (one / "weights").write_bytes(b"w")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_in_use_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        with scratch_folder(tmp_path):
            assert (folder / "weights").exists()
        holder.kill()
        holder.wait()
        assert folder.exists()
        with scratch_folder(tmp_path) as mine:
            assert sorted(tmp_path.iterdir()) == [mine, mine.with_suffix(".lock")]
