"""Partial rollouts: more prompts are at work than an iteration trains on, and what is unfinished waits for the next.

Responses grow in rounds, all of them by up to `rollout.partial_response_tokens` tokens. After a round it is looked at
which prompts have all their responses; as soon as `rollout.prompts` have, the oldest of these are the batch, and all
other prompts are carried with what was sampled of them, finished responses too: a group is trained on whole. Every
response ends at `rollout.max_response_tokens`, so that a batch is always reached.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moe_replay.archive.artifacts import Artifact
from moe_replay.engines.rollout import Request
from moe_replay.errors import ConfigError
from moe_replay.stages.carrying import PromptGroup, read_carried
from moe_replay.stages.run import Run
from moe_replay.stages.samples import Sample

_DRAWN, _DATA = "prompts_drawn", "data_sha256"


def groups_at_work(
    run: Run, iteration: int, carried: Artifact | None
) -> tuple[list[PromptGroup], dict[str, int | str]]:
    """What an iteration begins with: the groups that the rollout before left, at their head, and new ones behind.

    Also the attributes of the commit that tell the next iteration where to read on in the data. Raises ConfigError when
    what is carried is of other data, or as `read_carried`.
    """
    settings, table = run.config.rollout, run.train.open()
    groups, first = [], iteration * settings.prompts
    if carried is not None:
        if carried.commit.attributes.get(_DATA) != run.train.sha256:
            raise ConfigError(
                f"{carried.name} carries responses to prompts of a file with sha256 "
                f"{carried.commit.attributes.get(_DATA)}, the run has {run.train.sha256}; put the file back, or fork "
                "with another rollout.oversampled_prompts, which leaves them behind"
            )
        groups, first = read_carried(carried, table), int(str(carried.commit.attributes[_DRAWN]))
    number = settings.prompts + settings.oversampled_prompts - len(groups)
    new = table.read_on(first, number, run.seed("data"))
    groups += [PromptGroup(drawn, prompt, [None] * settings.responses) for drawn, prompt in enumerate(new, first)]
    return groups, {_DRAWN: first + number, _DATA: run.train.sha256}


def sample_until_whole(
    groups: Sequence[PromptGroup],
    wanted: int,
    sample_round: Callable[[int, list[tuple[PromptGroup, int]]], None],
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Have rounds sampled until `wanted` of at least as many groups are whole: the oldest whole ones, and the others.

    `sample_round` is given the number of the round, from 1, and each (group, member) that is unfinished, and has all of
    them take a stretch.
    """
    whole: list[PromptGroup] = []
    number = 0
    while number == 0 or len(whole) < wanted:
        number += 1
        sample_round(number, [(group, member) for group in groups for member in group.unfinished])
        whole = [group for group in groups if not group.unfinished]
    trained = whole[:wanted]
    return trained, [group for group in groups if group not in trained]


def requests_of(run: Run, unfinished: Sequence[tuple[PromptGroup, int]]) -> list[Request]:
    """What to ask of the engine for a round. Each stretch has a seed of its own, or it would repeat another's luck."""
    most = run.config.rollout.partial_response_tokens
    return [
        group.request(member, run.seed("stretch", group.drawn, member, group.length(member)), most)
        for group, member in unfinished
    ]


def staleness_metrics(samples: Sequence[Sample], iteration: int) -> dict[str, float]:
    """`rollout/*` of `docs/methods.md`, over the response tokens that are trained on."""
    versions = [version for sample in samples for version in sample.weight_versions or []]
    staleness_T = iteration - np.array(versions)
    return {
        "rollout/staleness_mean": float(staleness_T.mean()),
        "rollout/staleness_max": float(staleness_T.max()),
        "rollout/carried_tokens": float((staleness_T > 0).mean()),
    }
