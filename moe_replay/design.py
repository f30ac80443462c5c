"""The design of a comparison: which runs it consists of."""

import re
from collections.abc import Iterator, Sequence

from moe_replay.archive.layout import check_run_id
from moe_replay.config import RunConfig
from moe_replay.config_reading import parse_config
from moe_replay.errors import ConfigError
from moe_replay.methods import Method


def runs_of(
    config: RunConfig, methods: Sequence[Method], seeds: Sequence[int], comparison: str
) -> Iterator[tuple[str, RunConfig]]:
    """Id and config of each run, seed by seed, so that all methods have met the seeds that are through.

    Runs of one seed see the same problems, start from the same weights and sample with the same seeds.

    Raises ConfigError for a method or seed named twice, none at all, ids that are too long, and settings that a method
    can't do with.
    """
    for what, named in (("methods", [method.label for method in methods]), ("seeds", list(seeds))):
        if len(set(named)) < len(named) or not named:
            raise ConfigError(f"a comparison takes different {what}, one at least; given: {named}")
    tracking = config.tracking.model_dump() | {"comparison": comparison}
    for seed in seeds:
        for method in methods:
            settings = config.model_dump() | {"seed": seed, "method": method, "tracking": tracking}
            label = re.sub(r"[^A-Za-z0-9._-]+", "-", method.label)
            run_id = check_run_id(f"{comparison}-{label}-s{seed}")
            try:
                yield run_id, parse_config(settings)
            except ConfigError as error:
                raise ConfigError(f"run {run_id} of the comparison: {error}") from None
