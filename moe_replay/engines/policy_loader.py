"""What moe-replay has a vLLM worker do: swap weights in place, predictors merged, and tell of its routers.

Written against vLLM 0.28; mixed into its worker (`worker_extension_cls`).
"""

from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_replay.engines.merged_gates import MergedGates
from moe_replay.errors import RoutingMismatch


class PolicyLoader:
    """Called by name through `LLM.collective_rpc`."""

    model_runner: Any
    reload_weights: Callable[..., None]

    def moe_replay_fidelity(self, folder: str, predictor: str) -> float | None:
        """What the routers' precision would keep of a predictor (`MergedGates.fidelity`); changes nothing.

        Raises RoutingMismatch when the predictor doesn't fit the model, ArchiveCorrupt when its file isn't whole.
        """
        from moe_replay.engines.vllm_gates import precision_of, router_modules

        routers = router_modules(self.model_runner.get_model())
        layers, dtype = self.moe_replay_router_layers(), self.model_runner.model_config.dtype
        precision = {layer: precision_of(routers[layer]) if layer in routers else dtype for layer in layers}
        return MergedGates(Path(folder), Path(predictor), layers).fidelity(precision)

    def moe_replay_load(self, folder: str, predictor: str | None, routers_only: bool) -> None:
        """Replace the weights in place by those of a Hugging Face checkpoint folder, W by W + W_p in its routers.

        With `routers_only` all else is known to be in place: only routers are read and replaced.
        """
        from moe_replay.engines.vllm_gates import router_modules

        model, layers = self.model_runner.get_model(), self.moe_replay_router_layers()
        gates = MergedGates(Path(folder), Path(predictor) if predictor else None, layers)
        routers = router_modules(model)
        try:
            if routers_only and routers.keys() >= set(layers):
                self._moe_replay_reload_routers(routers, gates)
            else:
                self.reload_weights(weights_iterator=gates.merge(_checkpoint(self.model_runner, folder)))
                pack_experts(model)
        except BaseException:
            _end_reload(model, self.model_runner.model_config)
            raise

    def moe_replay_router_layers(self) -> list[int]:
        """Decoder layer index of each MoE layer, ascending; capture has a row for every decoder layer."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        modules = self.model_runner.get_model().modules()
        return sorted({module.layer_id for module in modules if isinstance(module, MoERunner)})

    @torch.no_grad()
    def _moe_replay_reload_routers(self, routers: dict[int, nn.Module], gates: MergedGates) -> None:
        """vLLM's own reload, held to the routers: all other layers keep their tensors as its kernels packed them."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for router in routers.values():
            initialize_layerwise_reload(router)
        self.model_runner.get_model().load_weights(gates.merge(gates.router_tensors()))
        # vLLM would give a router that still waits its old weight back, and with it the old predictor.
        waiting = [layer for layer, router in routers.items() if get_layerwise_info(router).can_load()]
        if waiting:
            raise RoutingMismatch(
                f"a router is reloaded whole, but those of decoder layers {waiting} did not get all their tensors from "
                "the checkpoint: load one that has them"
            )
        for router in routers.values():
            finalize_layerwise_reload(router, self.model_runner.model_config)


def _checkpoint(model_runner: Any, folder: str) -> Iterator[tuple[str, Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    source = copy(model_runner.model_config)
    source.model, source.revision = folder, None
    loader: Any = get_model_loader(model_runner.load_config)
    return loader.get_all_weights(source, model_runner.get_model())


def pack_experts(model: nn.Module) -> None:
    """Pack the experts' weights again for vLLM's CPU kernel, which a reload leaves in the plain layout.

    The kernel would read that layout as its own and answer garbage, without an error.
    """
    for module in model.modules():
        experts = _cpu_experts(module)
        if experts is not None:
            experts.process_weights_after_loading(module)


def _cpu_experts(module: nn.Module) -> Any:
    """The CPU kernel behind a module that owns expert weights, or none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not hasattr(module, "w13_weight"):
        return None
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(getattr(kernel, "impl", None), "fused_experts", None)
    return experts if isinstance(experts, CPUUnquantizedExperts) else None


def _end_reload(model: nn.Module, model_config: Any) -> None:
    """Take back a reload that failed midway.

    Layers that got a part of their weights wait for the rest, and would take the first of another checkpoint for it.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for module in model.modules():
        info = get_layerwise_info(module)
        info.load_numel, info.loaded_weights = 0, []
    finalize_layerwise_reload(model, model_config)
