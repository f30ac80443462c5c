"""The two calls of a router that are intercepted while its layer runs: its linear map and its top-k selection.

Shapes: R rows a router sees in one forward, E experts, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_replay.errors import ConfigError
from moe_replay.routing.discovery import Router

BYPASS = (
    "fused kernels choose experts out of reach of replay: load the model with "
    "experts_implementation='grouped_mm' or 'eager' and without hub kernels"
)

_LINEAR = torch.nn.functional.linear


@dataclass(frozen=True)
class LogitCall:
    """A router's linear map as it was called: the hidden states it got and the logits it gave, in its own dtype."""

    hidden_RH: Tensor
    logits_RE: Tensor
    """With the map's own bias where it has one (gpt-oss)."""


Choose = Callable[[int, Tensor, torch.return_types.topk, LogitCall | None], torch.return_types.topk]
"""What a layer's selection returns, given its decoder layer, scores [R, E], live result, and the call behind them."""


class Selection(TorchFunctionMode):
    """Active inside one layer's router or MoE block; hands on its selection call and, if wanted, the logits behind it.

    The logits are those of the last linear map with an [E, H] weight before the selection, which holds for a copy or
    a cast of the weight too. A router that computes them in another way has none.
    """

    def __init__(self, router: Router, choose: Choose, wants_logits: Callable[[], bool]):
        super().__init__()
        self._router, self._choose, self._wants_logits = router, choose, wants_logits
        self._fired: list[int] = []  # selections so far, one entry per forward of the scope now running
        self._call: LogitCall | None = None

    def enter(self, _scope: nn.Module, _args: Any) -> None:
        """Forward pre-hook."""
        self._fired.append(0)
        self.__enter__()

    def leave(self, _scope: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook; also called, with no output, when the forward or another hook of the scope raised."""
        if not self._fired:
            return  # an earlier pre-hook raised before `enter`
        self.__exit__(None, None, None)
        self._call = None
        if self._fired.pop() != 1 and output is not None:
            raise ConfigError(
                f"the router of decoder layer {self._router.layer} made no single topk call over [R, "
                f"E={self._router.num_experts}] with K={self._router.top_k} in its forward: {BYPASS}"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _LINEAR:
            if self._wants_logits():
                self._keep_logits(result, *args, **kwargs)
            return result
        if func not in (torch.topk, torch.Tensor.topk) or not self._selects(*args, **kwargs):
            return result
        self._fired[-1] += 1
        scores_RE, call, self._call = args[0] if args else kwargs["input"], self._call, None
        if call is not None and call.logits_RE.shape != scores_RE.shape:
            call = None
        return self._choose(self._router.layer, scores_RE, result, call)

    def _keep_logits(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        shape = (self._router.num_experts, self._router.hidden_size)
        if weight.shape == shape:
            hidden_RH, logits_RE = input.detach().reshape(-1, shape[1]), result.detach().reshape(-1, shape[0])
            self._call = LogitCall(hidden_RH, logits_RE)

    def _selects(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> bool:
        # Group-limited families call topk before on [R, groups, E / groups], which with one group is [R, 1, E],
        # and on [R, groups].
        sizes = (self._router.num_experts, self._router.top_k)
        return input.ndim == 2 and dim in (-1, 1) and largest and (input.shape[-1], k) == sizes


def in_backward() -> bool:
    """Whether this thread runs autograd's backward, so that a forward is an activation recompute."""
    return torch._C._current_graph_task_id() != -1
