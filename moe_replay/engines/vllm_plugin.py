"""Plugs moe-replay into vLLM (entry point `vllm.general_plugins`, loaded in every process of an engine).

Written against vLLM 0.28. On a CPU, vLLM's mixture-of-experts kernel selects experts itself and refuses capture;
`register` teaches it to report them. `PolicyLoader` is mixed into vLLM's worker (`worker_extension_cls`) and swaps
weights in place.
"""

from collections.abc import Callable
from typing import Any

import torch


def register() -> None:
    """Let vLLM's CPU experts report the ids they select. Idempotent; does nothing on an accelerator."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
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


class PolicyLoader:
    """What moe-replay asks of a vLLM worker; called by name through `LLM.collective_rpc`."""

    model_runner: Any

    def moe_replay_load(self, weights_path: str) -> None:
        """Replace the weights in place by those of a Hugging Face checkpoint folder.

        vLLM's CPU experts keep their weights packed for the kernel and are not packed again on reload: the kernel
        would read the plain layout and answer garbage, without an error.
        """
        self.model_runner.reload_weights(weights_path=weights_path)
        for module in self.model_runner.get_model().modules():
            experts = _cpu_experts(module)
            if experts is not None:
                experts.process_weights_after_loading(module)

    def moe_replay_router_layers(self) -> list[int]:
        """Decoder layer index of each MoE layer, ascending; capture has a row for every decoder layer."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        modules = self.model_runner.get_model().modules()
        return sorted({module.layer_id for module in modules if isinstance(module, MoERunner)})


def _cpu_experts(module: torch.nn.Module) -> Any:
    """The CPU kernel behind a module that owns expert weights, or none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not hasattr(module, "w13_weight"):
        return None
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(getattr(kernel, "impl", None), "fused_experts", None)
    return experts if isinstance(experts, CPUUnquantizedExperts) else None
