"""Record and replay the expert choice of any live Hugging Face MoE model, at its own top-k call.

A router's choice is one `topk(scores_RE, K)` in nearly every family of transformers; scores, bias, renormalisation and
scaling come before or after it. So one interception of that call serves all families and re-implements none: the
live choice is computed and recorded, and where a target is given the scores are gathered by the target's ids
instead. Replay changes the expert set alone (R3, arXiv 2510.11370); weights and their gradients stay the live
router's.

Shapes: R rows a router sees in one forward (batch * sequence, pads included), L MoE layers, E experts,
K experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.discovery import find_routers

_BYPASS = (
    "fused kernels choose experts out of reach of replay: load the model with "
    "experts_implementation='grouped_mm' or 'eager' and without hub kernels"
)
_HOOKED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # decoder stacks that carry a Routers' hooks


class Routers:
    """The routers of one live model, found by walking it; records their choice, or replays another in its place.

    A router is a module named `gate` or `router` that holds a [E, H] weight; its decoder layer is the first number
    of its path (`model.layers.3.mlp.gate` is layer 3), so dense-first and hash-routed models map by layer. Build it
    after `fully_shard`; hooks stay until `remove`. Targets are keyed by layer: activation checkpointing may
    recompute layers in any order, as long as targets change only after the backward of the forward they served.

    Raises ConfigError for a dense model, one without a top-k call in its routers (Phi-MoE), one that zeroes scores
    before it (DeepSeek-V2 with groups), one whose layers disagree in E or K or have two routers, and one that is
    hooked already. A forward raises it when a router does not make exactly one selection.
    """

    num_experts: int
    """E, as the routers' weights have it (zero-compute experts included)."""
    top_k: int
    """K, experts per token."""
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending; length L."""

    def __init__(self, model: nn.Module):
        stack_name, found = find_routers(model)
        self._stack = model.get_submodule(stack_name)
        if self._stack in _HOOKED:
            raise ConfigError(
                f"one model carries one Routers, and {stack_name or 'this model'!r} is hooked already: "
                "call remove() on the first or use it"
            )
        self.layers = tuple(router.layer for router in found)
        self.num_experts, self.top_k = found[0].num_experts, found[0].top_k
        self._targets: dict[int, tuple[Tensor, Tensor]] = {}
        self._live: dict[int, Tensor] = {}
        self._version = self._version_of_forward = 0
        _HOOKED[self._stack] = True
        self._handles = [
            self._stack.register_forward_pre_hook(self._begin_forward, prepend=True),
            self._stack.register_forward_hook(self._end_forward),
        ]
        for router in found:
            selection = _Selection(self, router.layer)
            self._handles += [
                router.scope.register_forward_pre_hook(selection.enter),
                router.scope.register_forward_hook(selection.leave, always_call=True),
            ]

    def remove(self) -> None:
        """Take all hooks off the model; it routes as it did before. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _HOOKED.pop(self._stack, None)

    def replay(self, ids_RLK: Tensor, present_R: Tensor) -> None:
        """Hold the experts of the forward passes that follow, and of their recompute, until replaced or cleared.

        ids_RLK: int64 [R, L, K], in any order within K, layers as in `layers`; kept in the order given because
        the summation order of experts decides the last bit. present_R: bool [R]; rows that are False are routed
        live and their ids ignored. Keep both on the model's device to spare a copy per layer.

        Raises RoutingMismatch if shapes, id range or distinctness within a row do not fit the model; a forward
        raises it when the rows that reach a router are not R.
        """
        self._check_targets(ids_RLK, present_R)
        self._targets = {
            layer: (ids_RK, present_R[:, None]) for layer, ids_RK in zip(self.layers, ids_RLK.unbind(1), strict=True)
        }
        self._version += 1

    def route_live(self) -> None:
        """Drop all targets: the forward passes that follow use the routers' own choice."""
        if self._targets:
            self._targets = {}
            self._version += 1

    @property
    def live_RLK(self) -> Tensor:  # noqa: N802  (shape-suffixed)
        """The routers' own choice in the last forward, also while replaying. -> int64 [R, L, K].

        It is what each router would have chosen on the hidden state it got. Raises RoutingMismatch if a layer
        has not fired.
        """
        silent = [layer for layer in self.layers if layer not in self._live]
        if silent:
            raise RoutingMismatch(
                f"live routes exist after a whole forward, but {len(silent)} of {len(self.layers)} MoE layers "
                f"have not fired (decoder layers {silent}): run the model first"
            )
        return torch.stack([self._live[layer] for layer in self.layers], dim=1)

    def _check_targets(self, ids_RLK: Tensor, present_R: Tensor) -> None:
        num_layers = len(self.layers)
        if ids_RLK.dtype != torch.int64 or present_R.dtype != torch.bool:
            raise RoutingMismatch(
                f"routes are int64 and their presence bool, got {ids_RLK.dtype} and {present_R.dtype}: "
                "widen stored ids before replaying them"
            )
        if ids_RLK.ndim != 3 or ids_RLK.shape[1:] != (num_layers, self.top_k):
            raise RoutingMismatch(
                f"routes have shape {list(ids_RLK.shape)} but the model needs [R, L={num_layers}, K={self.top_k}] "
                f"(decoder layers {list(self.layers)}): they were recorded on another model or layer map"
            )
        if present_R.shape != ids_RLK.shape[:1]:
            raise RoutingMismatch(
                f"presence has shape {list(present_R.shape)} but the routes have R={ids_RLK.shape[0]} rows: "
                "give one flag per row, pads included"
            )
        ids_PLK = ids_RLK[present_R.to(ids_RLK.device)].sort(-1).values
        if ids_PLK.numel() and (ids_PLK.min() < 0 or ids_PLK.max() >= self.num_experts):
            raise RoutingMismatch(
                f"expert ids span {int(ids_PLK.min())}..{int(ids_PLK.max())} but the model has "
                f"E={self.num_experts} (0..{self.num_experts - 1}): mark rows without a route as not present"
            )
        repeated = int((ids_PLK[..., 1:] == ids_PLK[..., :-1]).any(-1).sum())
        if repeated:
            raise RoutingMismatch(
                f"the K={self.top_k} experts of a route are distinct, but {repeated} of "
                f"{ids_PLK.shape[0] * num_layers} (row, layer) repeat one: rows were filled, not captured; "
                "mark them as not present"
            )

    def _begin_forward(self, _stack: nn.Module, _args: Any) -> None:
        if not _in_backward():  # the whole model may be under one checkpoint
            self._live = {}
            self._version_of_forward = self._version

    def _end_forward(self, _stack: nn.Module, _args: Any, _output: Any) -> None:
        silent = [layer for layer in self.layers if layer not in self._live]
        if silent:
            raise ConfigError(
                f"every router fires once in a forward, but those of decoder layers {silent} did not: {_BYPASS}"
            )

    def _choose(self, layer: int, scores_RE: Tensor, live: torch.return_types.topk) -> torch.return_types.topk:
        """What a layer's top-k call returns: its live result, or the target's ids with their live scores."""
        if not _in_backward():
            if layer in self._live:
                raise ConfigError(
                    f"every router fires once in a forward, but that of decoder layer {layer} fired twice: "
                    "models that share a layer or select twice cannot be replayed"
                )
            self._live[layer] = live.indices.detach()
        elif self._version != self._version_of_forward:
            raise RoutingMismatch(
                f"decoder layer {layer} is recomputed in backward under targets number {self._version}, its forward "
                f"ran under number {self._version_of_forward}: call replay or route_live only after backward"
            )
        if layer not in self._targets:
            return live
        ids_RK, present_R1 = (target.to(scores_RE.device) for target in self._targets[layer])
        if ids_RK.shape[0] != scores_RE.shape[0]:
            raise RoutingMismatch(
                f"routes have R={ids_RK.shape[0]} rows but {scores_RE.shape[0]} reach the router of decoder layer "
                f"{layer}: build targets for the padded micro-batch as the model gets it"
            )
        ids_RK = torch.where(present_R1, ids_RK, live.indices)
        return torch.return_types.topk((scores_RE.gather(-1, ids_RK), ids_RK))


class _Selection(TorchFunctionMode):
    """Active inside one layer's router or MoE block; hands its selection call, and nothing else, to `Routers`."""

    def __init__(self, routers: Routers, layer: int):
        super().__init__()
        self._routers, self._layer = routers, layer
        self._fired: list[int] = []  # selections so far, one entry per forward of the scope now running

    def enter(self, _scope: nn.Module, _args: Any) -> None:
        """Forward pre-hook."""
        self._fired.append(0)
        self.__enter__()

    def leave(self, _scope: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook; also called, with no output, when the forward or another hook of the scope raised."""
        if not self._fired:
            return  # an earlier pre-hook raised before `enter`
        self.__exit__(None, None, None)
        if self._fired.pop() != 1 and output is not None:
            raise ConfigError(
                f"the router of decoder layer {self._layer} made no single topk call over [R, "
                f"E={self._routers.num_experts}] with K={self._routers.top_k} in its forward: {_BYPASS}"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (torch.topk, torch.Tensor.topk) or not self._selects(*args, **kwargs):
            return result
        self._fired[-1] += 1
        return self._routers._choose(self._layer, args[0] if args else kwargs["input"], result)

    def _selects(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> bool:
        # Group-limited families call topk before on [R, groups, E / groups], which with one group is [R, 1, E],
        # and on [R, groups].
        sizes = (self._routers.num_experts, self._routers.top_k)
        return input.ndim == 2 and dim in (-1, 1) and largest and (input.shape[-1], k) == sizes


def _in_backward() -> bool:
    """Whether this thread runs autograd's backward, so that a forward is an activation recompute."""
    return torch._C._current_graph_task_id() != -1
