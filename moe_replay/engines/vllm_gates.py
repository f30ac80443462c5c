"""vLLM's routers, and how they are held in float32 by an engine of another precision.

Written against vLLM 0.28, and met only in its processes. vLLM builds a router as a linear layer in the engine's
precision and offers no setting for another. A model loader of our own, registered under a load format of our own,
widens them after the model is built and before its weights are read, so that reading, reloading and CUDA graphs work
as they do for vLLM's own float32 routers (GLM-4.5, MiniMax-M2).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from moe_replay.engines.gates import place_of
from moe_replay.engines.rollout import FLOAT32_GATES
from moe_replay.errors import ConfigError


@register_model_loader(FLOAT32_GATES)
class Float32GateLoader(DefaultModelLoader):
    """Reads a checkpoint as vLLM does by default, into a model whose routers are widened to float32."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(replace(load_config, load_format="auto"))

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises ConfigError when the model's routers can't be held in float32."""
        widen_routers(model)
        super().load_weights(model, model_config)

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raises ConfigError when the experts' kernel wants logits of another precision."""
        model = super().load_model(*args, **kwargs)
        for runner in _runners(model):
            kernel = getattr(getattr(runner, "_quant_method", None), "moe_kernel", None)
            experts = getattr(getattr(kernel, "impl", None), "fused_experts", None)
            routing = runner.moe_config.routing_method
            if experts is not None and not experts._supports_router_logits_dtype(torch.float32, routing):
                raise _cannot_widen(
                    f"the kernel {type(experts).__name__} of {runner.layer_name} takes no float32 logits"
                )
        return model


class Float32Gate(UnquantizedLinearMethod):
    """A linear layer whose weight and result are float32, whatever its input is."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [T, H] in the engine's precision. -> float32 [T, E]."""
        return super().apply(layer, x.float(), bias)


def widen_routers(model: nn.Module) -> None:
    """Hold the routers of a model that is built but not loaded in float32, with inputs cast up.

    Raises ConfigError when a layer's router isn't found or isn't a plain linear layer.
    """
    found = router_modules(model)
    for runner in _runners(model):
        gate = found.get(runner.layer_id)
        if gate is None or runner._fse_fuse_gate:
            raise _cannot_widen(f"decoder layer {runner.layer_id} has no router of its own that is known by its name")
        if precision_of(gate) != torch.float32:
            _widen(gate, f"the router of decoder layer {runner.layer_id}")


def router_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer to router, for layers in which one module is named as routers are and holds a weight."""
    found: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        place = place_of(name)
        if place is not None and place[1] == "" and isinstance(getattr(module, "weight", None), Tensor):
            found.setdefault(place[0], []).append(module)
    return {layer: modules[0] for layer, modules in found.items() if len(modules) == 1}


def precision_of(router: Any) -> torch.dtype:
    """In what a router holds its weight."""
    # vLLM's CPU kernels pack a linear layer's weight away and leave an empty tensor of any dtype.
    return router.params_dtype if isinstance(router, LinearBase) else router.weight.dtype


def _widen(gate: Any, what: str) -> None:
    if type(gate) not in (ReplicatedLinear, GateLinear) or type(gate.quant_method) is not UnquantizedLinearMethod:
        method = type(getattr(gate, "quant_method", None)).__name__
        raise _cannot_widen(f"{what} is a {type(gate).__name__} ({method}), not a plain linear layer")
    device: torch.device = gate.weight.device
    gate.weight.data = gate.weight.data.float()
    if gate.bias is not None:
        gate.bias.data = gate.bias.data.float()
    gate.params_dtype = torch.float32
    gate.quant_method = Float32Gate()
    if isinstance(gate, GateLinear):
        # Its kernels for bfloat16 weights were chosen when it was built; what is left is the plain product.
        gate.allow_ll_bf16_gemm = gate.allow_dsv3_router_gemm = gate.allow_cublas_router_gemm = False
        gate.out_dtype = torch.float32
    with device:  # where a reload puts it together again
        record_metadata_for_reloading(gate)


def _runners(model: nn.Module) -> Iterator[MoERunner]:
    return (module for module in model.modules() if isinstance(module, MoERunner))


def _cannot_widen(reason: str) -> ConfigError:
    return ConfigError(
        f"routers can be held in float32 where vLLM computes them as plain linear layers: {reason}; "
        'set rollout.gate_dtype = "engine"'
    )
