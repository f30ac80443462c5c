"""What all commands share: the consoles, common options, and how this command is called."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, TextIO

from cyclopts import Parameter
from rich.console import Console

from moe_replay.config_reading import parse_config
from moe_replay.errors import ConfigError
from moe_replay.places import run_root

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object and nothing else.")]
Quiet = Annotated[
    bool, Parameter(name="--quiet", negative="", help="Print the name of what was made and errors, nothing else.")
]
Root = Annotated[str | None, Parameter(name="--root", help="fsspec URL under which runs lie.")]
Settings = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="A setting as key=value with a dotted key; may be repeated."),
]

_UNWRAPPED = 1 << 16
"""Characters of a line, where no terminal has to show it."""


def _width(stream: TextIO) -> int | None:
    """A terminal's own; what goes to a file or another program has a line a row, whatever COLUMNS says."""
    return None if stream.isatty() else _UNWRAPPED


out = Console(width=_width(sys.stdout))
"""Standard output, for results."""
err = Console(stderr=True, width=_width(sys.stderr))
"""Standard error, for what a program that reads the results must not see."""
_nowhere = Console(quiet=True, force_terminal=False)


def console_for_progress(as_json: bool, quiet: bool) -> Console:
    """Where progress is shown: apart from what a program reads, and nowhere when nobody wants it."""
    return _nowhere if quiet else err if as_json else out


def root_of(root: str | None) -> str:
    """The URL under which runs lie: `root` where given, else the default; raises ConfigError for an unusable one."""
    return run_root(parse_config({"storage": {"root": root}}))


def run_and_iteration(name: str) -> tuple[str, int | None]:
    """The parts of RUN or RUN@ITERATION; raises ConfigError for anything else."""
    run_id, at, iteration = name.partition("@")
    if at and not re.fullmatch(r"\d+", iteration):
        raise ConfigError(f"{name!r} is neither a run nor RUN@ITERATION, for example {run_id}@3")
    return run_id, int(iteration) if at else None


def command_name() -> str:
    """How this command is called here: by its name where that is on the PATH, else by its path."""
    called = Path(sys.argv[0])
    return called.name if shutil.which(called.name) == str(called.absolute()) else os.path.relpath(called)
