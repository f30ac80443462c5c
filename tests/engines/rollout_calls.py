"""What tests have vLLM do beside its engine's own methods; imported by name in its process."""

import os
import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.engines.process import Progress
from moe_replay.engines.rollout import Request, Response
from moe_replay.sections import RolloutConfig

if TYPE_CHECKING:
    from moe_replay.engines.replicas import RolloutReplicas
    from moe_replay.engines.rollout import RolloutEngine

LONGEST_PROMPT = 300
CONFIG = RolloutConfig(dtype="float32", max_prompt_tokens=LONGEST_PROMPT, max_response_tokens=8)


def describe(engine: "RolloutEngine", progress: Progress) -> tuple[int, int, tuple[int, ...], int]:
    """(E, K, layers, tokens of a block of the prefix cache)."""
    cache = engine._llm.llm_engine.vllm_config.cache_config
    assert cache.enable_prefix_caching
    return engine.num_experts, engine.top_k, engine.layers, cache.block_size


def generate(
    engine: "RolloutEngine", progress: Progress, requests: Sequence[Request], temperature: float
) -> list[Response]:
    return engine.generate(requests, temperature, progress)


def generate_in_shares(
    engine: "RolloutEngine", progress: Progress, requests: Sequence[Request], temperature: float, share: int
) -> tuple[list[Response], list[tuple[int, int]]]:
    """As `generate` where the config says `share`; also (done, total) of the progress that was told."""
    config, told = engine.config, []
    engine.config = config.model_copy(update={"share": share})
    try:
        return engine.generate(requests, temperature, lambda done, total, _: told.append((done, total))), told
    finally:
        engine.config = config


def load(
    engine: "RolloutEngine", progress: Progress, folder: Path, weights: str, predictor: tuple[Path, str] | None = None
) -> str | None:
    engine.load(folder, weights, predictor)
    return engine.weights


def held(engine: "RolloutEngine", progress: Progress) -> tuple[str | None, str | None, str | None, float | None]:
    """(Weights, predictor, digest of the checkpoint's gates, merge fidelity)."""
    return engine.weights, engine.predictor_sha256, engine.gates_sha256, engine.merge_fidelity


def replicas(engine: "RolloutReplicas", progress: Progress) -> list[int]:
    """Their process ids."""
    return engine.pids


def generate_while_one_dies(
    engine: "RolloutReplicas", progress: Progress, requests: Sequence[Request], temperature: float
) -> list[Response]:
    """As `generate`; the first replica is killed once every replica has a share to work on."""
    first = engine.pids[0]
    killed = []

    def kill_first(*_: Any) -> None:
        if not killed:
            os.kill(first, signal.SIGKILL)
            killed.append(first)

    return engine.generate(requests, temperature, kill_first)


def rest_after_one_died(engine: "RolloutReplicas", progress: Progress) -> list[int]:
    """Rest, as between stages on GPUs that are taken in turns, after the first was killed; those that are left."""
    os.kill(engine.pids[0], signal.SIGKILL)
    engine._colocated = True
    try:
        engine.rest()
    finally:
        engine._colocated = False
    return engine.pids


def route(engine: "RolloutEngine", progress: Progress, layer: int, hidden_TH: np.ndarray) -> tuple[str, np.ndarray]:
    """Dtype and values of the logits [T, E] that the router of a decoder layer gives to hidden states."""
    import torch

    from moe_replay.engines.vllm_gates import router_modules

    def logits(model: torch.nn.Module) -> tuple[str, np.ndarray]:
        dtype = getattr(torch, engine.config.dtype)
        output: torch.Tensor = router_modules(model)[layer](torch.from_numpy(hidden_TH).to(dtype))[0]
        return str(output.dtype), output.float().numpy()

    return engine._llm.apply_model(logits)[0]


def widen_another(engine: "RolloutEngine", progress: Progress) -> None:
    """Widen the routers of the engine's model as if those of layer 2 were of a kind that isn't known."""
    import torch

    from moe_replay.engines.vllm_gates import router_modules, widen_routers

    def widen(model: torch.nn.Module) -> None:
        router: Any = router_modules(model)[2]
        kind, router.__class__ = type(router), type("Other", (type(router),), {})
        precision, router.params_dtype = router.params_dtype, torch.bfloat16
        try:
            widen_routers(model)
        finally:
            router.__class__, router.params_dtype = kind, precision

    engine._llm.apply_model(widen)


def in_bfloat16(engine: "RolloutEngine", progress: Progress, model: Path, function: str, *args: Any) -> Any:
    """Run another function of this file on a second engine of this process: bfloat16, its routers in float32."""
    return globals()[function](_engine_in_bfloat16(model, engine.config), progress, *args)


_kept: list["RolloutEngine"] = []
"""vLLM's engines of one process share what they would take with them."""


@cache
def _engine_in_bfloat16(model: Path, config: RolloutConfig) -> "RolloutEngine":
    from moe_replay.engines.rollout import RolloutEngine

    return RolloutEngine(model, "first", config.model_copy(update={"dtype": "bfloat16", "gate_dtype": "float32"}))


def generate_silently(
    engine: "RolloutEngine", progress: Progress, model: Path, requests: Sequence[Request]
) -> list[Response]:
    """On another engine of this process, on a kernel that agrees to report the experts it selects and never does."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from moe_replay.engines.rollout import RolloutEngine

    kernel: Any = CPUUnquantizedExperts
    set_capture_fn = kernel.set_capture_fn
    kernel.set_capture_fn = lambda self, capture_fn: None
    try:
        silent = RolloutEngine(model, "silent", engine.config)
    finally:
        kernel.set_capture_fn = set_capture_fn
    _kept.append(silent)
    return silent.generate(requests, 1.0, progress)
