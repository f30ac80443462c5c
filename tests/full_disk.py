"""A file system of a given size, for tests of what happens when it is full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system in memory at `folder`; the test is skipped where mounting is not permitted."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(options, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(folder: Path, num_bytes: int) -> None:
    """Give the file system at `folder` another size."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(folder)], check=True)
