"""Forward and backward of a tiny model, and what is compared of two of them.

Shapes: R rows, L MoE layers, K experts per token, V vocabulary.
"""

import torch
from families import ROWS, inputs
from torch import Tensor, nn

from moe_replay.routing.routers import Routers


def forward(model: nn.Module) -> Tensor:
    """-> logits [B, S, V]"""
    return model(**inputs(), use_cache=False).logits


def backward(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients by parameter name of a fixed scalar of the logits; parameters that got none are left out."""
    model.zero_grad(set_to_none=True)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    logits = forward(model)
    return logits.detach(), backward(model, logits)


def foreign_routes(routers: Routers, seed: int = 3) -> Tensor:
    """Random distinct experts for each row and layer. -> [R, L, K]"""
    noise = torch.rand(ROWS, len(routers.layers), routers.num_experts, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., : routers.top_k]


def everywhere() -> Tensor:
    return torch.ones(ROWS, dtype=torch.bool)


def assert_same_step(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Bit-exact outputs and gradients."""
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    assert [name for name in want[1] if not torch.equal(got[1][name], want[1][name])] == []


def router_weights(model: nn.Module, routers: Routers) -> dict[int, Tensor]:
    """Each MoE layer's [E, H] router weight."""
    parameters = dict(model.named_parameters())
    return {layer: parameters[name] for layer, name in _router_names(routers, parameters).items()}


def router_gradients(routers: Routers, gradients: dict[str, Tensor]) -> dict[int, Tensor]:
    """The gradient of each MoE layer's [E, H] router weight."""
    return {layer: gradients[name] for layer, name in _router_names(routers, gradients).items()}


def random_predictor(routers: Routers, scale: float = 0.05) -> dict[int, Tensor]:
    """W_p [E, H] for each MoE layer, large enough to change some choices."""
    generator = torch.Generator().manual_seed(5)
    shape = (routers.num_experts, routers.hidden_size)
    return {layer: scale * torch.randn(shape, generator=generator) for layer in routers.layers}


def same_sets(one: Tensor, other: Tensor) -> Tensor:
    """Whether the last dimensions hold the same experts, in any order."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1)


def _router_names(routers: Routers, parameters: dict[str, Tensor]) -> dict[int, str]:
    found = {}
    for layer in routers.layers:
        names = [name for name in parameters if f"layers.{layer}." in name and _is_router_weight(name)]
        assert len(names) == 1, names
        found[layer] = names[0]
    return found


def _is_router_weight(name: str) -> bool:
    parents = name.split(".")[:-1]
    return name.endswith("weight") and ("router" in parents[-2:] or "gate" in parents[-2:])
