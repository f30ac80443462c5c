"""Record, replay or predict the expert choice of any live Hugging Face MoE model, at its own top-k call.

A router's choice is one `topk(scores_RE, K)` in nearly every family of transformers; scores, bias, renormalisation and
scaling come before or after it. So one interception of that call serves all families and re-implements none: the
live choice is computed and recorded, and where a target is given the scores are gathered by the target's ids
instead. Replay changes the expert set alone (R3, arXiv 2510.11370), and so does prediction (PR2, arXiv 2606.00395);
weights and their gradients stay the live router's.

Shapes: R rows a router sees in one forward (those of its rank, pads included), S rows watched, L MoE layers, E experts,
K experts per token, H hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.discovery import find_routers
from moe_replay.routing.observation import Observer, RouterFeatures, require_call, require_no_strays, strays
from moe_replay.routing.row_prediction import RowPrediction
from moe_replay.routing.row_routes import RowRoutes
from moe_replay.routing.selection import BYPASS, LogitCall, Selection, in_backward

_HOOKED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # decoder stacks that carry a Routers' hooks


class Routers:
    """The routers of one live model, found by walking it; records their choice, or puts another in its place.

    A router is a module named `gate` or `router` that holds a [E, H] weight; its decoder layer is the first number
    of its path (`model.layers.3.mlp.gate` is layer 3), so dense-first and hash-routed models map by layer. Build it
    after `fully_shard`; hooks stay until `remove`. Targets are keyed by layer: activation checkpointing may
    recompute layers in any order, as long as targets change only after the backward of the forward they served.
    Recompute is never recorded.

    Raises ConfigError for a dense model, one without a top-k call in its routers (Phi-MoE), one that zeroes scores
    before it (DeepSeek-V2 with groups), one whose layers disagree in E, K or H or have two routers, and one that is
    hooked already. A forward raises it when a router does not make exactly one selection.
    """

    num_experts: int
    """E, as the routers' weights have it (zero-compute experts included)."""
    top_k: int
    """K, experts per token."""
    hidden_size: int
    """H, of what the routers get."""
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
        self.num_experts, self.top_k, self.hidden_size = found[0].num_experts, found[0].top_k, found[0].hidden_size
        self._targets: RowRoutes | None = None
        self._prediction: RowPrediction | None = None
        self._observer = Observer()
        self._live: dict[int, Tensor] = {}
        self._routed: dict[int, Tensor] = {}
        self._strays: dict[int, tuple[Tensor, int]] = {}
        self._version = self._version_of_forward = 0
        _HOOKED[self._stack] = True
        self._handles = [
            self._stack.register_forward_pre_hook(self._begin_forward, prepend=True),
            self._stack.register_forward_hook(self._end_forward),
        ]
        for router in found:
            selection = Selection(router, self._choose, self._wants_logits)
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
        targets = self._row_routes(ids_RLK, present_R)
        self.route_live()
        self._targets = targets
        self._version += 1

    def predict(self, predictor: Mapping[int, Tensor], present_R: Tensor) -> None:
        """Choose by p + h W_p in the forward passes that follow, and weigh by the live p, until replaced or cleared.

        predictor: W_p [E, H] by decoder layer; a layer that has none, or zeros, is routed live. Sums are float32.
        present_R: bool [R]; rows that are False are routed live. Pads are best left so, as in `replay`: how many rows
        an expert serves decides the last bit.

        Raises RoutingMismatch for layers or shapes that the model does not have; a forward raises it when the rows
        that reach a router are not R, and ConfigError when a predicted layer's own choice is not that of its K largest
        logits.
        """
        prediction = RowPrediction(predictor, present_R, self.num_experts, self.hidden_size, self.layers)
        self.route_live()
        self._prediction = prediction
        self._version += 1

    def route_live(self) -> None:
        """Drop targets and predictor: the forward passes that follow use the routers' own choice."""
        if self._targets is not None or self._prediction is not None:
            self._targets = self._prediction = None
            self._version += 1

    def watch(self, rows_S: Tensor) -> None:
        """Keep the features of these rows, int64 [S], in each forward that follows, until `forget`.

        Such a forward raises RoutingMismatch for a row it does not have, and ConfigError when a router's choice for
        one of them is not that of its K largest logits or its logits are out of reach.
        """
        self._observer.watch(rows_S)

    def compare(self, ids_RLK: Tensor | None = None, present_R: Tensor | None = None) -> None:
        """Measure the coverage gap of these routes in each forward that follows, until `forget`.

        Shapes and errors as in `replay`. Without arguments the routes are those now replayed.
        """
        if ids_RLK is not None and present_R is not None:
            self._observer.reference = self._row_routes(ids_RLK, present_R)
        elif self._targets is not None:
            self._observer.reference = self._targets
        else:
            raise RoutingMismatch("no routes are replayed that could be compared: give compare its own")

    def forget(self) -> None:
        """Keep nothing but choices in the forward passes that follow, and drop what the last one kept."""
        self._observer = Observer()

    @property
    def live_RLK(self) -> Tensor:  # noqa: N802  (shape-suffixed)
        """The routers' own choice in the last forward, also while replaying or predicting. -> int64 [R, L, K].

        It is what each router would have chosen on the hidden state it got. Raises RoutingMismatch if a layer
        has not fired.
        """
        return self._of_all_layers(self._live)

    @property
    def routed_RLK(self) -> Tensor:  # noqa: N802
        """The experts that served the last forward: replayed, predicted or live. -> int64 [R, L, K].

        Raises RoutingMismatch if a layer has not fired.
        """
        return self._of_all_layers(self._routed)

    @property
    def features(self) -> RouterFeatures:
        """What the routers got and gave in the last forward for the rows watched; RoutingMismatch without any."""
        return self._observer.features(self.layers)

    @property
    def coverage_gap_RL(self) -> Tensor:  # noqa: N802
        """1 - Σ softmax(p) over the routes compared, in the last forward. -> float32 [R, L].

        NaN in rows without a route and for routers whose logits are out of reach. RoutingMismatch without any.
        """
        return self._observer.coverage_gap_RL(self.layers)

    def _row_routes(self, ids_RLK: Tensor, present_R: Tensor) -> RowRoutes:
        return RowRoutes(ids_RLK, present_R, self.num_experts, self.top_k, self.layers)

    def _of_all_layers(self, chosen: dict[int, Tensor]) -> Tensor:
        silent = [layer for layer in self.layers if layer not in chosen]
        if silent:
            raise RoutingMismatch(
                f"live routes exist after a whole forward, but {len(silent)} of {len(self.layers)} MoE layers "
                f"have not fired (decoder layers {silent}): run the model first"
            )
        return torch.stack([chosen[layer] for layer in self.layers], dim=1)

    def _begin_forward(self, _stack: nn.Module, _args: Any) -> None:
        if not in_backward():  # the whole model may be under one checkpoint
            self._live, self._routed, self._strays = {}, {}, {}
            self._observer.clear()
            self._version_of_forward = self._version

    def _end_forward(self, _stack: nn.Module, _args: Any, _output: Any) -> None:
        silent = [layer for layer in self.layers if layer not in self._live]
        if silent:
            raise ConfigError(
                f"every router fires once in a forward, but those of decoder layers {silent} did not: {BYPASS}"
            )
        require_no_strays(self._strays)

    def _wants_logits(self) -> bool:
        return self._prediction is not None or (self._observer.asked and not in_backward())

    def _choose(
        self, layer: int, scores_RE: Tensor, live: torch.return_types.topk, call: LogitCall | None
    ) -> torch.return_types.topk:
        """What a layer's top-k call returns: its live result, or the target's ids with their live scores."""
        recomputes = in_backward()
        if not recomputes:
            self._record(layer, scores_RE.detach(), live.indices.detach(), call)
        elif self._version != self._version_of_forward:
            raise RoutingMismatch(
                f"decoder layer {layer} is recomputed in backward under targets number {self._version}, its forward "
                f"ran under number {self._version_of_forward}: call replay, predict or route_live only after backward"
            )
        ids_RK = self._target(layer, scores_RE, live.indices, call)
        if not recomputes:
            self._count_strays(layer, scores_RE.detach(), live.indices, call)
        if ids_RK is None:
            return live
        if not recomputes:
            self._routed[layer] = ids_RK
        return torch.return_types.topk((scores_RE.gather(-1, ids_RK), ids_RK))

    def _record(self, layer: int, scores_RE: Tensor, live_RK: Tensor, call: LogitCall | None) -> None:
        if layer in self._live:
            raise ConfigError(
                f"every router fires once in a forward, but that of decoder layer {layer} fired twice: "
                "models that share a layer or select twice cannot be replayed"
            )
        self._live[layer] = self._routed[layer] = live_RK
        self._observer.see(layer, scores_RE, call)

    def _count_strays(self, layer: int, scores_RE: Tensor, live_RK: Tensor, call: LogitCall | None) -> None:
        """Where logits are predicted from or kept, how many rows did not choose by them."""
        prediction = self._prediction_of(layer)
        rows = self._observer.rows_S if prediction is None else prediction.rows_P
        if rows is not None and call is not None:
            rows = rows.to(scores_RE.device)
            self._strays[layer] = strays(call.logits_RE[rows], scores_RE[rows], live_RK[rows]).sum(), len(rows)

    def _target(self, layer: int, scores_RE: Tensor, live_RK: Tensor, call: LogitCall | None) -> Tensor | None:
        """The experts that take the place of the live choice, [R, K]; None where it stands."""
        if self._targets is not None:
            ids_RK, present_R1 = self._targets.at(layer, scores_RE)
        elif (prediction := self._prediction_of(layer)) is not None:
            ids_RK, present_R1 = prediction.at(layer, require_call(layer, call), self.top_k)
        else:
            return None
        return torch.where(present_R1, ids_RK, live_RK)

    def _prediction_of(self, layer: int) -> RowPrediction | None:
        return self._prediction if self._prediction is not None and layer in self._prediction else None
