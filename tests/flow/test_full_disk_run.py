"""A whole run on a disk that gets full, and goes on when there is room."""

from pathlib import Path

import pytest
from command import EXACT, run_json, start
from full_disk import enlarge, small_disk
from kills import committed_bytes

MB = 2**20


@pytest.mark.slow
def test_a_run_that_fills_its_disk_fails_at_once_and_resumes_when_there_is_room(tmp_path: Path) -> None:
    words = ("run", "--run-id=small", "--iterations=3")
    run_json(*words, f"--root={(tmp_path / 'roomy').as_uri()}", settings=EXACT)
    with small_disk(tmp_path / "disk", 30 * MB) as disk:
        root = f"--root={disk.as_uri()}"
        full = start(*words, root, settings=EXACT)
        _, told = full.communicate(timeout=600)
        assert full.returncode == 1, told
        assert "No space left on device" in told
        assert "make room" in told
        assert "Traceback" not in told
        before = committed_bytes(disk / "small")
        assert 0 < len(before) < len(committed_bytes(tmp_path / "roomy/small"))
        enlarge(disk, 100 * MB)

        run_json("resume", "small", root)

        after = committed_bytes(disk / "small")
        assert after == committed_bytes(tmp_path / "roomy/small")
        assert before.items() <= after.items()


@pytest.mark.slow
def test_a_home_without_room_for_scratch_files_is_told_and_the_run_goes_on_in_another(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"--root={(tmp_path / 'runs').as_uri()}"
    with small_disk(tmp_path / "disk", 12 * MB) as disk:
        (disk / "embedded").symlink_to(home / "embedded")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
        monkeypatch.chdir(tmp_path)
        full = start("run", "--run-id=small", "--iterations=1", root, settings=EXACT, MOE_REPLAY_HOME=str(disk))
        _, told = full.communicate(timeout=600)
    assert full.returncode == 1, told
    assert f"writing below {disk}/scratch failed" in told

    assert len(run_json("resume", "small", root)["iterations"]) == 1
