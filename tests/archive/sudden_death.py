"""A process that ends by SIGKILL at a chosen moment of its work on files."""

import os
import signal
import sys
from typing import Any

_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def die_before_change(folder: str, number: int) -> None:
    """Have this process die before it makes its change number 0, 1, ... below a folder.

    Changes are what Python's audit events tell of: files opened for writing, renamed, linked and removed, folders made
    and removed.
    """
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        is_opened = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wxa"
        if (is_opened or event in _CHANGES) and folder in str(arguments[0]):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
