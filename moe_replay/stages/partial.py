"""Partial rollouts: more prompts are at work than an iteration trains on, and what is unfinished waits for the next.

Responses grow in rounds, all of them by up to `rollout.partial_response_tokens` tokens. After a round it is looked at
which prompts have all their responses; as soon as `rollout.prompts` have, the oldest of these are the batch, and all
other prompts are carried with what was sampled of them, finished responses too: a group is trained on whole. Every
response ends at `rollout.max_response_tokens`, so that a batch is always reached.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_replay.archive.artifacts import Artifact
from moe_replay.archive.routes import RouteOrigin
from moe_replay.engines.rollout import Request
from moe_replay.errors import ConfigError
from moe_replay.stages.carrying import PartialAbout, read_about, read_carried
from moe_replay.stages.prompt_groups import PromptGroup
from moe_replay.stages.run import Run
from moe_replay.stages.samples import Sample


class AtWork(NamedTuple):
    """What a partial rollout begins with."""

    groups: list[PromptGroup]
    """Those that the rollout before left, at their head, and new ones."""
    origins: dict[int, RouteOrigin]
    """Of the tokens that are there already, by weight version."""


def begin_rollout(run: Run, iteration: int, before: Artifact | None) -> AtWork:
    """Go on with what the rollout before left, and draw new prompts beside it.

    Raises ConfigError when what is carried is of other data, else as `read_carried`.
    """
    settings, table = run.config.rollout, run.train.open()
    about = read_about(before) if before else None
    groups, first, origins = [], iteration * settings.prompts, {}
    if before and about:
        if about.data_sha256 != run.train.sha256:
            raise ConfigError(
                f"{before.name} carries responses to prompts of a file with sha256 {about.data_sha256}, the run has "
                f"{run.train.sha256}; put the file back, or fork with another rollout.oversampled_prompts, which "
                "leaves them behind"
            )
        groups, first, origins = read_carried(before, table), about.prompts_drawn, about.origins
    number = settings.prompts + settings.oversampled_prompts - len(groups)
    new = table.read_on(first, number, run.seed("data"))
    groups += [PromptGroup(drawn, prompt, [None] * settings.responses) for drawn, prompt in enumerate(new, first)]
    return AtWork(groups, origins)


def about_rollout(run: Run, at_work: AtWork, version: int, origin: RouteOrigin) -> PartialAbout:
    """What is to be known of a rollout whose new tokens are of `origin`, weight version `version`."""
    origins = at_work.origins | {version: origin}
    versions = sorted(set().union(*(group.versions() for group in at_work.groups)))
    return PartialAbout(
        prompts_drawn=1 + max(group.drawn for group in at_work.groups),
        data_sha256=run.train.sha256,
        origins={one: origins[one] for one in versions},
    )


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
    # One round at least, also where enough of what is carried is whole: all that is at work comes nearer to its end.
    while len(whole) < wanted:
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


def staleness_metrics(samples: Sequence[Sample], iteration: int, own: int) -> dict[str, float]:
    """`rollout/*` of `docs/methods.md`, over the response tokens that are trained on.

    `own` is the weight version of the rollout, which that of a sample is where it tells none.
    """
    versions = [v for sample in samples for v in sample.weight_versions or [own] * len(sample.response_ids)]
    versions_T = np.array(versions)
    staleness_T = iteration - versions_T
    return {
        "rollout/staleness_mean": float(staleness_T.mean()),
        "rollout/staleness_max": float(staleness_T.max()),
        "rollout/carried_tokens": float((versions_T < own).mean()),
    }
