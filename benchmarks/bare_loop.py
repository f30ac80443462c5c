"""GRPO, or R3 with its routes replayed, as a bare loop: what is left of an iteration without a pipeline around it.

The functions that take an engine run in the processes of `EnginePool`, on the same vLLM and verl engines and through
the same calls as moe-replay's stages. Nothing is kept but the weights in memory: tokens go from vLLM to verl through a
pipe, weights back in one file on a file system in memory, from which vLLM reloads. No stage, commit, checksum, archive,
checkpoint, optimizer state on disk, metric or evaluation.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_replay.config import RunConfig
from moe_replay.data.prompts import Prompt
from moe_replay.engines.pool import EnginePool
from moe_replay.engines.process import no_progress
from moe_replay.stages.run import Run

METHODS = ("grpo", "r3")
"""What the loop can do; the other methods need passes that it lacks."""


class Sampled(NamedTuple):
    """One response, as it goes to the trainer."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float
    trace: Any
    """Its routes, where they are replayed."""


class Iteration(NamedTuple):
    """What is known of an iteration when it has ended."""

    ended: float
    """Seconds since 1970."""
    response_tokens: int
    reward: float
    """Mean over the batch."""


def iterate(pool: EnginePool, run: Run, memory: Path) -> Iterator[Iteration]:
    """Train from the run's initial model; weights pass through a file in the folder `memory`."""
    config, prompts = run.config, run.train.open()
    here = "bare_loop"
    weights = memory / "policy.safetensors"
    pool.rollout().call(f"{here}:start_over", no_progress, run)
    pool.training().call(f"{here}:start_over", no_progress, run)
    for n in range(config.iterations):
        drawn = prompts.draw(n, config.rollout.prompts, run.seed("data"))
        seeds = [run.seed("rollout", n, number) for number in range(len(drawn) * config.rollout.responses)]
        newest = weights if n else None
        samples = pool.rollout().call(f"{here}:roll_out", no_progress, config, drawn, seeds, newest)
        pool.training().call(f"{here}:train", no_progress, config, samples, run.seed("training", n), weights)
        tokens = sum(len(one.response_ids) for one in samples)
        yield Iteration(time.time(), tokens, sum(one.reward for one in samples) / len(samples))


def start_over(engine: Any, progress: object, run: Run) -> None:
    """Hold the run's initial model."""
    from moe_replay.engines.training import TrainingEngine

    if isinstance(engine, TrainingEngine):
        engine.load(run.model, run.model_sha256, is_checkpoint=False)
    else:
        engine.load(run.model, run.model_sha256)


def roll_out(
    engine: Any, progress: Any, config: RunConfig, prompts: list[Prompt], seeds: list[int], weights: Path | None
) -> list[Sampled]:
    """Take the weights, sample the responses of each prompt under their seeds, and score them."""
    from moe_replay.data.rewards import score
    from moe_replay.engines.rollout import Request

    if weights is not None:
        load_weights(engine, weights)
    of = [prompt for prompt in prompts for _ in range(config.rollout.responses)]
    requests = [Request(prompt.messages, seed) for prompt, seed in zip(of, seeds, strict=True)]
    responses = engine.generate(requests, config.rollout.temperature, progress)
    replays = config.method.route_source == "rollout"
    return [
        Sampled(
            response.prompt_ids,
            response.response_ids,
            score(prompt.data_source, response.text, prompt.ground_truth, prompt.extra_info),
            response.trace if replays else None,
        )
        for prompt, response in zip(of, responses, strict=True)
    ]


def train(engine: Any, progress: Any, config: RunConfig, samples: list[Sampled], seed: int, weights: Path) -> None:
    """Old log-probs, then κ optimizer steps, under the routes of the rollout where there are any; write weights."""
    import torch
    from torch.nn.functional import pad

    from moe_replay.engines.training_batch import TokenSequence

    torch.manual_seed(seed)
    sequences = [TokenSequence(torch.tensor(one.prompt_ids), torch.tensor(one.response_ids)) for one in samples]
    replays = config.method.route_source == "rollout"
    # Sums over experts go by their order; the archive's is ascending too.
    routes = [one.trace.ascending() for one in samples] if replays else None
    advantages_NS = advantages_of(samples, config.rollout.responses)
    width, size = advantages_NS.shape[1], len(samples) // config.training.mini_steps
    parts = [slice(start, start + size) for start in range(0, len(samples), size)]
    given = [(sequences[part], routes[part] if routes else None) for part in parts]
    temperature = config.rollout.temperature
    scored = [engine.score(*one, temperature).log_probs_NS for one in given]
    old_NS = torch.cat([pad(part_NS, (0, width - part_NS.shape[1])) for part_NS in scored])
    for part, one in zip(parts, given, strict=True):
        engine.step(*one, old_NS[part], advantages_NS[part], None, config.method, temperature)
    save_weights(engine, weights)


def advantages_of(samples: list[Sampled], responses: int) -> Any:
    """verl's GRPO advantages, [N, S]; each `responses` samples answer one prompt."""
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    mask_NS = pad_sequence([torch.ones(len(one.response_ids)) for one in samples], batch_first=True)
    rewards_NS = torch.zeros(mask_NS.shape)
    rewards_NS[:, 0] = torch.tensor([one.reward for one in samples])
    groups_N = np.arange(len(samples)) // responses
    return compute_grpo_outcome_advantage(rewards_NS, mask_NS, groups_N)[0]


def save_weights(engine: Any, path: Path) -> None:
    """verl's own export for an inference engine, in one file."""
    from safetensors.torch import save_file

    tensors, _ = engine._ranks.engine.get_per_tensor_param()
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors}, path)


def load_weights(engine: Any, path: Path) -> None:
    """vLLM's own reload in place, from a file that is read by memory mapping."""
    engine._llm.collective_rpc(_reload, args=(str(path),))
    engine.weights = None


def _reload(worker: Any, path: str) -> None:
    from safetensors.torch import load_file

    from moe_replay.engines.policy_loader import pack_experts

    worker.reload_weights(weights_iterator=iter(load_file(path).items()))
    pack_experts(worker.model_runner.get_model())
