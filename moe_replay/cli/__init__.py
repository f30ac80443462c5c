"""The command line, `moe-replay`: one module a group of commands. Heavy packages are imported inside the commands."""

from moe_replay.cli.app import main

__all__ = ["main"]
