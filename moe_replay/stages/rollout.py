"""Rollout: responses to the iteration's prompts, their rewards, and the routes that served them.

Runs in the process of the rollout engine.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.archive.artifacts import Artifact, StageWriter
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.routes import RouteOrigin
from moe_replay.data.prompts import Prompt
from moe_replay.data.rewards import score
from moe_replay.engines.process import Progress
from moe_replay.engines.rollout import Request, Response
from moe_replay.stages.carrying import write_carried
from moe_replay.stages.partial import about_rollout, begin_rollout, requests_of, sample_until_whole, staleness_metrics
from moe_replay.stages.prompt_groups import PromptGroup
from moe_replay.stages.run import Run
from moe_replay.stages.samples import Sample, write_samples

if TYPE_CHECKING:
    from moe_replay.engines.rollout import RolloutEngine


def generate_rollouts(
    engine: "RolloutEngine",
    progress: Progress,
    run: Run,
    iteration: int,
    policy: ArtifactRef,
    predictor: ArtifactRef | None = None,
    carried: ArtifactRef | None = None,
) -> ArtifactRef:
    """Sample `rollout.responses` answers to each of `rollout.prompts` prompts, score and commit them.

    A `predictor` is merged into the gates, so that the routes are the predicted ones (PR2). Partial rollouts go on with
    what the rollout before, `carried`, left unfinished.

    Raises:
        ConfigError: a prompt is too long, nothing can score its source, or `carried` is not the rollout before.
        RoutingMismatch: the engine's routes can't be trusted, or the predictor is of another model.
    """
    inputs = {"policy": policy} | ({"predictor": predictor} if predictor else {})
    inputs |= {"carried": carried} if carried else {}
    before = run.carried(carried, iteration) if run.config.rollout.partial_response_tokens else None
    writer = run.store().begin("rollout", iteration, inputs, run.digest("rollout"))
    load_policy(engine, run, policy, (predictor, iteration) if predictor else None)
    origin, version = _origin(engine, run, policy), run.weight_version(policy)
    if run.config.rollout.partial_response_tokens is None:
        samples = _sample_to_the_end(engine, progress, run, iteration)
        metrics = sample_metrics(samples)
    else:
        samples = _sample_in_rounds(engine, progress, run, iteration, version, before, origin, writer)
        metrics = sample_metrics(samples)
    if run.config.rollout.partial_response_tokens or run.config.rollout.one_step_off:
        metrics |= staleness_metrics(samples, iteration, version)
    write_samples(writer, samples)
    engine.rest()
    if engine.merge_fidelity is not None:
        metrics["predictor/merge_fidelity"] = engine.merge_fidelity
    return writer.commit(metrics=metrics, attributes=origin.model_dump(mode="json"))


def _sample_to_the_end(engine: "RolloutEngine", progress: Progress, run: Run, iteration: int) -> list[Sample]:
    settings = run.config.rollout
    prompts = run.train.open().draw(iteration, settings.prompts, run.seed("data"))
    groups = [group for group in range(len(prompts)) for _ in range(settings.responses)]
    requests = [
        Request(prompts[group].messages, run.seed("rollout", iteration, number)) for number, group in enumerate(groups)
    ]
    responses = engine.generate(requests, settings.temperature, progress)
    return [
        make_sample(number, group, prompts[group], response)
        for number, (group, response) in enumerate(zip(groups, responses, strict=True))
    ]


def _sample_in_rounds(
    engine: "RolloutEngine",
    progress: Progress,
    run: Run,
    iteration: int,
    version: int,
    before: Artifact | None,
    origin: RouteOrigin,
    writer: StageWriter,
) -> list[Sample]:
    """The samples of a partial rollout; what it leaves to the next one is written."""
    settings = run.config.rollout
    at_work = begin_rollout(run, iteration, before)

    def sample_round(number: int, unfinished: Sequence[tuple[PromptGroup, int]]) -> None:
        def told(done: int, total: int, what: str) -> None:
            progress(done, total, f"{what} of round {number}")

        responses = engine.generate(requests_of(run, unfinished), settings.temperature, told)
        for (group, member), response in zip(unfinished, responses, strict=True):
            group.take(member, response, version, settings.max_response_tokens)

    trained, left = sample_until_whole(at_work.groups, settings.prompts, sample_round)
    write_carried(writer, left, about_rollout(run, at_work, version, origin))
    members = [(group, member) for group in range(len(trained)) for member in trained[group].begun]
    return [
        make_sample(number, group, trained[group].prompt, member.response, member.weight_versions)
        for number, (group, member) in enumerate(members)
    ]


def load_policy(
    engine: "RolloutEngine", run: Run, ref: ArtifactRef, serving: tuple[ArtifactRef, int] | None = None
) -> None:
    """Have the engine hold the weights of `ref`, and merged into them no predictor but the one that is `serving`.

    `serving` is a predictor and the iteration that it serves. Nothing is fetched when the engine holds both already.
    """
    if (engine.weights, engine.predictor_sha256) == (ref.sha256, serving[0].sha256 if serving else None):
        return
    with run.policy(ref, with_optimizer=False) as policy, ExitStack() as stack:
        merged = (stack.enter_context(run.predictor(*serving)), serving[0].sha256) if serving else None
        engine.load(policy.model_folder, policy.sha256, merged)


def make_sample(
    number: int, group: int, prompt: Prompt, response: Response, weight_versions: list[int] | None = None
) -> Sample:
    """Score a response and keep it with its prompt's place."""
    return Sample(
        sequence_id=number,
        prompt_row=prompt.row,
        group=group,
        data_source=prompt.data_source,
        prompt_ids=response.prompt_ids,
        response_ids=response.response_ids,
        log_probs=response.log_probs,
        text=response.text,
        reward=score(prompt.data_source, response.text, prompt.ground_truth, prompt.extra_info),
        truncated=response.truncated,
        weight_versions=weight_versions,
        trace=response.trace,
    )


def sample_metrics(samples: list[Sample]) -> dict[str, float]:
    """`reward/*` and `response/*` of `docs/methods.md`."""
    rewards = np.array([sample.reward for sample in samples])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "response/length": float(np.mean([len(sample.response_ids) for sample in samples])),
        "response/truncated": float(np.mean([sample.truncated for sample in samples])),
    }


def _origin(engine: "RolloutEngine", run: Run, policy: ArtifactRef) -> RouteOrigin:
    return RouteOrigin(
        source="vllm",
        engine_version=engine.version,
        dtype=run.config.rollout.dtype,
        weights_sha256=policy.sha256,
        gates_sha256=engine.gates_sha256,
        predictor_sha256=engine.predictor_sha256,
        layers=engine.layers,
        num_experts=engine.num_experts,
        top_k=engine.top_k,
    )
