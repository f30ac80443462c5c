"""What tests have vLLM do beside its engine's own methods; imported by name in its process."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_replay.config import RolloutConfig
from moe_replay.engines.process import Progress
from moe_replay.engines.rollout import Request, Response

if TYPE_CHECKING:
    from moe_replay.engines.rollout import RolloutEngine


def describe(engine: "RolloutEngine", progress: Progress) -> tuple[int, int, tuple[int, ...], int]:
    """(E, K, layers, tokens of a block of the prefix cache)."""
    cache = engine._llm.llm_engine.vllm_config.cache_config
    assert cache.enable_prefix_caching
    return engine.num_experts, engine.top_k, engine.layers, cache.block_size


def generate(
    engine: "RolloutEngine", progress: Progress, requests: Sequence[Request], temperature: float
) -> list[Response]:
    return engine.generate(requests, temperature, progress)


def load(engine: "RolloutEngine", progress: Progress, folder: Path, weights: str) -> str | None:
    engine.load(folder, weights)
    return engine.weights


def build_silent(model: Path, weights: str, config: RolloutConfig) -> "RolloutEngine":
    """An engine on a kernel that agrees to report the experts it selects and never does."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from moe_replay.engines import vllm_plugin
    from moe_replay.engines.rollout import RolloutEngine

    vllm_plugin.register()
    CPUUnquantizedExperts.set_capture_fn = lambda self, capture_fn: None  # pyright: ignore[reportAttributeAccessIssue]
    return RolloutEngine(model, weights, config)
