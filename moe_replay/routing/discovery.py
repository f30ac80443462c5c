"""Find the routers of a live Hugging Face MoE model by walking it: which modules they are, in which decoder layer.

Nothing is known of families: a router is a module named `gate` or `router`, inside a numbered layer, that holds an
[E, H] weight and makes one top-k call.
"""

import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from moe_replay.errors import ConfigError
from moe_replay.router_names import ROUTER_NAMES
from moe_replay.routing.declared import TOP_K_KEYS


@dataclass(frozen=True)
class Router:
    """One router: its decoder layer, E, K, H, and the module whose forward makes the selection."""

    layer: int
    num_experts: int
    top_k: int
    hidden_size: int
    scope: nn.Module


def find_routers(model: nn.Module) -> tuple[str, list[Router]]:
    """The path of the module that owns the decoder layers, and its routers by layer."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "topk_method", None) == "group_limited_greedy":
        raise ConfigError(
            "replay gathers weights from full scores, but topk_method='group_limited_greedy' (DeepSeek-V2) zeroes "
            "those outside the live groups before its topk: this model cannot be replayed"
        )
    found: dict[tuple[str, int], Router] = {}
    for path, gate in router_modules(model):
        stack, router = _router_at(path, gate, model, config)
        if router is None:
            continue
        if (stack, router.layer) in found:
            raise ConfigError(
                f"a decoder layer has one router, but layer {router.layer} has another at {path}: "
                "this model family cannot be replayed"
            )
        found[stack, router.layer] = router
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no router (a module named gate or router with a [E, H] weight inside a "
            "numbered decoder layer): dense models have no routes; use a method without routing replay"
        )
    _check_agreement(found)
    routers = sorted(found.values(), key=lambda router: router.layer)
    return next(iter(found))[0], routers


def router_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(Path, module) of the outermost modules named like a router that hold its weight, inside a numbered layer."""
    gates: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        parts = path.split(".")
        inside = any(path.startswith(outer + ".") for outer, _ in gates[-1:])
        if parts[-1] in ROUTER_NAMES and any(map(str.isdigit, parts)) and not inside and _weight_shape(module)[0] > 1:
            gates.append((path, module))
    return gates


def _router_at(path: str, gate: nn.Module, model: nn.Module, config: Any) -> tuple[str, Router | None]:
    """The path of the decoder stack a gate belongs to, and its router unless the layer has nothing to replay."""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    stack, layer = ".".join(parts[: max(at - 1, 0)]), int(parts[at])
    block = model.get_submodule(".".join(parts[:-1]))
    # The choice is made by the gate, its block, or the block's experts; Gemma-4 has no block but the layer.
    scope = gate if len(parts) == at + 2 else block
    if _calls_topk(scope):
        num_experts, hidden_size = _weight_shape(gate)
        return stack, Router(layer, num_experts, _top_k(path, gate, block, config), hidden_size, scope)
    if hasattr(gate, "tid2eid"):
        return stack, None  # DeepSeek-V4 hash layer: the token id alone decides its experts
    raise ConfigError(
        f"replay intercepts a router's topk call, and {path} ({type(gate).__name__}) makes none: this "
        "model family cannot be replayed; run it with a method without routing replay"
    )


def _weight_shape(gate: nn.Module) -> tuple[int, int]:
    """(E, H) of the router's weight, its own or a direct child's (`layer`, `proj`, `wg`, ...); zeros without one."""
    weights = [getattr(module, "weight", None) for module in (gate, *gate.children())]
    return next(((w.shape[0], w.shape[1]) for w in weights if isinstance(w, Tensor) and w.ndim == 2), (0, 0))


def _top_k(path: str, gate: nn.Module, block: nn.Module, config: Any) -> int:
    values = [getattr(module, "top_k", None) for module in (gate, block)]
    values += [getattr(config, name, None) for name in TOP_K_KEYS]
    top_k = next((value for value in values if isinstance(value, int)), None)
    if top_k is None:
        raise ConfigError(
            f"experts per token is read from top_k of the router or its block, or from the config's "
            f"{', '.join(TOP_K_KEYS)}; {path} has none: this model family cannot be replayed"
        )
    return top_k


def _check_agreement(found: dict[tuple[str, int], Router]) -> None:
    stacks = sorted({stack for stack, _ in found})
    if len(stacks) > 1:
        raise ConfigError(f"routers belong to one decoder stack, found {stacks}: pass the language model alone")
    for name in ("num_experts", "top_k", "hidden_size"):
        by_value = {getattr(router, name): router.layer for router in found.values()}
        if len(by_value) > 1:
            raise ConfigError(
                f"all MoE layers of a model have the same {name}, found {sorted(by_value)} "
                f"(on decoder layers {list(by_value.values())}, for one of each): this model cannot be replayed"
            )


def _calls_topk(scope: nn.Module) -> bool:
    """Whether the code of a module, its children or the functions they call names `topk`."""
    classes = {base for module in (scope, *scope.children()) for base in type(module).__mro__}
    methods = [value for cls in classes if cls.__module__.split(".")[0] != "torch" for value in vars(cls).values()]
    pending, seen = [inspect.unwrap(m) for m in methods if isinstance(m, FunctionType)], set()
    while pending:
        function = pending.pop()
        if function in seen or not isinstance(function, FunctionType):
            continue
        seen.add(function)
        names = function.__code__.co_names
        if "topk" in names:
            return True
        pending += [inspect.unwrap(f) for n in names if callable(f := function.__globals__.get(n))]
    return False
