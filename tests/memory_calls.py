"""What tests have an engine do about its memory; imported by name in its process."""

import re
import resource
import threading
from pathlib import Path

import torch

from moe_replay.engines.process import Progress

_STACK_BYTES = 256 * 1024


def leave_memory(engine: object, progress: Progress, num_bytes: int) -> None:
    """Let the process take so many bytes more; an allocation beyond them fails as on a machine that has no more."""
    # Threads take memory for their stacks, and what needs a thread and can't start one ends, or waits for ever.
    square = torch.ones(512, 512)
    square @ square
    threading.stack_size(_STACK_BYTES)
    taken = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert taken is not None
    limit = int(taken[1]) * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
