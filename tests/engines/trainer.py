"""The training engine's calls by name, and batches, routes and comparisons for its tests."""

from typing import Any

import numpy as np
from models import same_sets
from training_calls import Seen, random_batch

from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.routing.trace import RoutingTrace

E, K, LAYERS = 8, 2, (0, 1, 2)
BATCH = random_batch()
LENGTHS = [len(prompt) + len(response) for prompt, response in zip(BATCH.prompts, BATCH.responses, strict=True)]


class Trainer:
    """Calls on the bench by name."""

    def __init__(self, bench: EngineProcess):
        self._bench = bench

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._bench.call(f"training_calls:{name}", no_progress, *args)


def traces(ids: list[np.ndarray], last_missing: bool = False, experts: int = E, layers=LAYERS) -> list[RoutingTrace]:
    return [RoutingTrace.from_capture(row[: len(row) - last_missing], len(row), experts, layers) for row in ids]


def foreign_routes(lengths=LENGTHS, experts: int = E, top_k: int = K, layers=LAYERS) -> list[RoutingTrace]:
    """Routes that no router would choose: random experts for each token and layer."""
    rng = np.random.default_rng(11)
    ids = [rng.permuted(np.tile(np.arange(experts), (n, len(layers), 1)), axis=-1)[..., :top_k] for n in lengths]
    return traces(ids, experts=experts, layers=layers)


def assert_same(one: Seen, other: Seen, tolerance: float = 0.0) -> None:
    for a, b in zip(one.log_probs + one.entropy, other.log_probs + other.entropy, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    for a, b in zip(one.live, other.live, strict=True):
        assert same_sets(a, b).all()


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
