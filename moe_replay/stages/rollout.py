"""Rollout: responses to the iteration's prompts, their rewards, and the routes that served them.

Runs in the process of the rollout engine.
"""

from typing import TYPE_CHECKING

import numpy as np

from moe_replay.archive.commits import ArtifactRef
from moe_replay.data.prompts import Prompt
from moe_replay.data.rewards import score
from moe_replay.engines.process import Progress
from moe_replay.engines.rollout import Request, Response
from moe_replay.stages.run import Run
from moe_replay.stages.samples import Sample, write_samples

if TYPE_CHECKING:
    from moe_replay.engines.rollout import RolloutEngine


def generate_rollouts(
    engine: "RolloutEngine", progress: Progress, run: Run, iteration: int, policy: ArtifactRef
) -> ArtifactRef:
    """Sample `rollout.responses` answers to each of `rollout.prompts` prompts, score and commit them.

    Raises:
        ConfigError: a prompt is too long, or nothing can score its source.
        RoutingMismatch: the engine's routes can't be trusted.
    """
    settings = run.config.rollout
    writer = run.store().begin("rollout", iteration, {"policy": policy}, run.digest("rollout"))
    prompts = run.train.open().draw(iteration, settings.prompts, run.seed("data"))
    groups = [group for group in range(len(prompts)) for _ in range(settings.responses)]
    requests = [
        Request(prompts[group].messages, run.seed("rollout", iteration, number)) for number, group in enumerate(groups)
    ]
    load_policy(engine, run, policy)
    responses = engine.generate(requests, settings.temperature, progress)
    samples = [
        make_sample(number, group, prompts[group], response)
        for number, (group, response) in enumerate(zip(groups, responses, strict=True))
    ]
    write_samples(writer, samples)
    return writer.commit(metrics=sample_metrics(samples), attributes=_origin(engine, run, policy))


def load_policy(engine: "RolloutEngine", run: Run, ref: ArtifactRef) -> None:
    """Have the engine hold the weights of `ref`; nothing is fetched when it does."""
    if engine.weights == ref.sha256:
        return
    with run.policy(ref, with_optimizer=False) as policy:
        engine.load(policy.folder / "huggingface" if policy.is_checkpoint else policy.folder, policy.sha256)


def make_sample(number: int, group: int, prompt: Prompt, response: Response) -> Sample:
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


def _origin(engine: "RolloutEngine", run: Run, policy: ArtifactRef) -> dict:
    return {
        "source": "vllm",
        "engine_version": engine.version,
        "dtype": run.config.rollout.dtype,
        "weights_sha256": policy.sha256,
        "gates_sha256": engine.gates_sha256,
        "predictor_sha256": None,
        "num_experts": engine.num_experts,
        "top_k": engine.top_k,
        "layers": list(engine.layers),
    }
