"""What tests have verl do; imported by name in its process. Tensors travel as numpy."""

import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from memory_calls import leave_memory

from moe_replay.archive.commits import ArtifactRef
from moe_replay.config import RunConfig
from moe_replay.config_reading import parse_config
from moe_replay.engines.process import Progress
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.run import Run

if TYPE_CHECKING:  # imports verl, which belongs in the engine's process
    from moe_replay.engines.training import Pass, TokenSequence, TrainingEngine


@dataclass(frozen=True)
class Batch:
    """Prompt and response ids of N sequences, with what a step needs of them (numpy [N, S])."""

    prompts: list[list[int]]
    responses: list[list[int]]
    old_NS: np.ndarray
    advantages_NS: np.ndarray
    importance_NS: np.ndarray | None = None


@dataclass(frozen=True)
class Seen:
    """A `Pass` in numpy, split by sequence."""

    log_probs: list[np.ndarray]
    entropy: list[np.ndarray]  # empty for a step, which computes none
    live: list[np.ndarray]
    loss: float
    grad_norm: float
    coverage_gap: list[np.ndarray] = field(default_factory=list)
    hidden_SLH: np.ndarray | None = None  # of all sequences
    logits_SLE: np.ndarray | None = None
    routed: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Asked:
    """What a pass is asked for beyond log-probs and live routes."""

    reference: list[RoutingTrace] | None = None
    sampled: list[np.ndarray] | None = None
    predictor: dict[int, np.ndarray] | None = None  # of a scoring pass
    lr_factor: float = 1.0  # of a step


class Bench:
    """Room for one training engine at a time."""

    def __init__(self) -> None:
        import verl  # noqa: F401 (ten seconds that no test should wait for twice)

        torch.set_num_threads(1)
        self.engine: TrainingEngine | None = None
        self.config = make_config()

    @property
    def held(self) -> "TrainingEngine":
        assert self.engine is not None, "open a model first"
        return self.engine


def random_batch(vocabulary: int = 98, sequences: int = 9, longest: int = 12) -> Batch:
    """Sequences of many lengths, the shortest with one token of prompt and of response."""
    rng = random.Random(3)
    lengths = [(1, 1), (longest, 1), (1, longest)]
    lengths += [(rng.randint(1, longest), rng.randint(1, longest)) for _ in range(sequences - len(lengths))]
    ids = [[[rng.randrange(3, vocabulary) for _ in range(part)] for part in pair] for pair in lengths]
    shape = (sequences, longest)
    drawn = np.random.default_rng(5)
    return Batch(
        prompts=[pair[0] for pair in ids],
        responses=[pair[1] for pair in ids],
        old_NS=(-4.5 + 0.1 * drawn.standard_normal(shape)).astype("float32"),
        advantages_NS=np.repeat(drawn.standard_normal((sequences, 1)), longest, 1).astype("float32"),
    )


def make_config(training: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """A config of fp32 training; `training` is laid over its table."""
    table = {"micro_batch_tokens": 4096, "learning_rate": 1e-2, **(training or {})}
    rollout = {"max_prompt_tokens": 12, "max_response_tokens": 12, **settings.pop("rollout", {})}
    return parse_config({"training": table, "rollout": rollout, **settings})


def open_model(bench: Bench, progress: Progress, model: Path, config: RunConfig) -> tuple[int, int, tuple[int, ...]]:
    """Build an engine in place of the one before; returns (E, K, layers)."""
    from moe_replay.engines.training import TrainingEngine

    bench.config = config
    bench.engine = TrainingEngine(model, "initial", config.training, config.resources)
    return bench.engine.num_experts, bench.engine.top_k, bench.engine.layers


def configure(bench: Bench, progress: Progress, config: RunConfig) -> None:
    """Take method and temperature of another config with the calls to come; the engine stays as it was built."""
    bench.config = config


def load_weights(bench: Bench, progress: Progress, folder: Path, weights: str, is_checkpoint: bool) -> None:
    bench.held.load(folder, weights, is_checkpoint)


def load(bench: Bench, progress: Progress, folder: Path, weights: str, is_checkpoint: bool) -> bool:
    """Load weights; returns whether anything was built for it."""
    ranks: Any = bench.held._ranks
    before = ranks.engine
    bench.held.load(folder, weights, is_checkpoint)
    return ranks.engine is not before


def save(bench: Bench, progress: Progress, folder: Path) -> None:
    bench.held.save(folder)


def score(
    bench: Bench, progress: Progress, batch: Batch, routes: list[RoutingTrace] | None, asked: Asked | None = None
) -> Seen:
    asked = asked or Asked()
    predictor = asked.predictor and {layer: torch.from_numpy(weight) for layer, weight in asked.predictor.items()}
    given = (bench.config.rollout.temperature, asked.reference, asked.sampled, predictor)
    return _seen(bench.held.score(_sequences(batch), routes, *given), batch)


def step(
    bench: Bench, progress: Progress, batch: Batch, routes: list[RoutingTrace] | None, asked: Asked | None = None
) -> Seen:
    asked = asked or Asked()
    importance = None if batch.importance_NS is None else torch.from_numpy(batch.importance_NS)
    old, advantages = torch.from_numpy(batch.old_NS), torch.from_numpy(batch.advantages_NS)
    settings = (bench.config.method, bench.config.rollout.temperature, asked.reference, asked.sampled, asked.lr_factor)
    return _seen(bench.held.step(_sequences(batch), routes, old, advantages, importance, *settings), batch)


def train_stage(bench: Bench, progress: Progress, run: Run, iteration: int, *inputs: ArtifactRef) -> ArtifactRef:
    from moe_replay.stages.training import train_replayed

    return train_replayed(bench.held, progress, run, iteration, *inputs)


def score_in_little_memory(bench: Bench, progress: Progress, batch: Batch, num_bytes: int) -> Seen:
    """Score with so many bytes more than the process has taken already."""
    leave_memory(bench, progress, num_bytes)
    try:
        return score(bench, progress, batch, None)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def hidden_size(bench: Bench, progress: Progress) -> int:
    return bench.held.hidden_size


def name_of_weights(bench: Bench, progress: Progress) -> str | None:
    return bench.held.weights


def weights(bench: Bench, progress: Progress) -> dict[str, np.ndarray]:
    """All parameters of the model, whole."""
    ranks: Any = bench.held._ranks
    state = ranks.engine.module.state_dict()
    return {name: getattr(value, "full_tensor", lambda v=value: v)().numpy().copy() for name, value in state.items()}


def served(bench: Bench, progress: Progress, batch: Batch) -> list[np.ndarray]:
    """By sequence, the experts [tokens, L, K] that served the last pass, which was one micro-batch."""
    ranks: Any = bench.held._ranks
    lengths = [len(prompt) + len(response) for prompt, response in zip(batch.prompts, batch.responses, strict=True)]
    served_BSLK = ranks.engine.routers.routed_RLK.unflatten(0, (len(lengths), max(lengths)))
    return [rows[:length].numpy() for rows, length in zip(served_BSLK, lengths, strict=True)]


def registered_losses(bench: Bench, progress: Progress) -> list[str]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return sorted(POLICY_LOSS_REGISTRY)


def drive_ranks(log: str, model: str) -> None:
    """A driving process with an engine of two ranks; says so once they work, and waits."""
    from moe_replay.engines.process import EngineProcess, no_progress

    engine = EngineProcess("training_calls:Bench", (), "training", Path(log), {"OMP_NUM_THREADS": "1"})
    config = make_config(resources={"training_world_size": 2})
    engine.call("training_calls:open_model", no_progress, Path(model), config)
    print("ranks work", flush=True)
    time.sleep(600)


def _sequences(batch: Batch) -> "list[TokenSequence]":
    from moe_replay.engines.training import TokenSequence

    pairs = zip(batch.prompts, batch.responses, strict=True)
    return [TokenSequence(torch.tensor(prompt), torch.tensor(response)) for prompt, response in pairs]


def _seen(found: "Pass", batch: Batch) -> Seen:
    tokens = [len(prompt) + len(response) for prompt, response in zip(batch.prompts, batch.responses, strict=True)]
    assert len(found.live_TLK) == sum(tokens)

    def unpadded(values_NS: torch.Tensor) -> list[np.ndarray]:
        return [row[: len(ids)].numpy() for row, ids in zip(values_NS, batch.responses, strict=True)]

    return Seen(
        log_probs=unpadded(found.log_probs_NS),
        entropy=[] if found.entropy_NS is None else unpadded(found.entropy_NS),
        live=[part.numpy() for part in found.live_TLK.split(tokens)],
        loss=found.loss,
        grad_norm=found.grad_norm,
        coverage_gap=[part.numpy() for part in found.coverage_gap_TL.split(tokens)],
        hidden_SLH=None if found.features is None else found.features.hidden_SLH.numpy(),
        logits_SLE=None if found.features is None else found.features.logits_SLE.numpy(),
        routed=None if found.routed_TLK is None else [part.numpy() for part in found.routed_TLK.split(tokens)],
    )
