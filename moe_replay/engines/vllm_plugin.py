"""Plugs moe-replay into vLLM (entry point `vllm.general_plugins`, loaded in every process of an engine).

Written against vLLM 0.28. On a CPU, vLLM's mixture-of-experts kernel selects experts itself and refuses capture;
`register` teaches it to report them, and makes the load format of `moe_replay.engines.vllm_gates` known.
"""

from collections.abc import Callable
from typing import Any

import torch


def register() -> None:
    """Make the load format known, and let vLLM's CPU experts report the ids they select. Idempotent."""
    from vllm.platforms import current_platform

    import moe_replay.engines.vllm_gates  # noqa: F401  (registers its loader)

    if current_platform.is_cpu():
        _let_cpu_experts_report()


def _let_cpu_experts_report() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if "set_capture_fn" in vars(CPUUnquantizedExperts):
        return
    select_experts = CPUUnquantizedExperts._select_experts

    def select_and_report(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids_TK = select_experts(self, *args, **kwargs)
        report = getattr(self, "_moe_replay_report", None)
        if report is not None:
            report(ids_TK)
        return weights, ids_TK

    def set_capture_fn(self: Any, capture_fn: Callable[[torch.Tensor], None] | None) -> None:
        self._moe_replay_report = capture_fn

    CPUUnquantizedExperts._select_experts = select_and_report
    CPUUnquantizedExperts.supports_routing_replay_capture = lambda self: True
    CPUUnquantizedExperts.set_capture_fn = set_capture_fn
