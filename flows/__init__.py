"""Prefect flows. Importing them settles the environment first, so that a worker runs as the command line does."""

from moe_replay.environment import set_defaults

set_defaults()
