"""A real S3 server on loopback: `rclone serve s3` over a folder."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsspec.asyn import AsyncFileSystem
from s3fs import S3FileSystem

ACCESS_KEY = "moe-replay-tests"
SECRET_KEY = "only-for-this-loopback-server"
BUCKET = "runs"
START_SECONDS = 30


@dataclass
class S3Server:
    """Where a server listens, and the folder whose subfolders are its buckets."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, for the first time or again after a kill, on the same port."""
        rclone = Path(sys.executable).with_name("rclone")
        command = [rclone, "serve", "s3", f"--auth-key={ACCESS_KEY},{SECRET_KEY}", f"--addr=127.0.0.1:{self.port}"]
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            self.process = subprocess.Popen([*command, self.folder], stdout=log, stderr=log)
        _wait_until_up(self.process, self.port)

    def kill(self) -> None:
        """End the server by SIGKILL, whatever it is at."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)


@contextmanager
def serving(folder: Path) -> Iterator[S3Server]:
    """Serve `folder` with one bucket `BUCKET`; the server is stopped by its own process id."""
    (folder / BUCKET).mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = S3Server(probe.getsockname()[1], folder)
    try:
        server.start()
        yield server
    finally:
        assert server.process is not None
        server.process.terminate()
        server.process.wait(10)


def environment(url: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> dict[str, str]:
    """The variables with which a process reaches the S3 endpoint at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def forget_clients() -> None:
    """Make what is opened next read the environment again: fsspec keeps one client for each set of options."""
    AsyncFileSystem.clear_instance_cache()
    S3FileSystem.clear_instance_cache()


def _wait_until_up(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, f"rclone ended with code {process.returncode}"
            assert time.monotonic() < deadline, f"rclone did not listen within {START_SECONDS} s"
            time.sleep(0.05)
