"""Routes for verl's Megatron engine, which replays them by itself, and what its routers tell of a forward pass.

verl's engine takes routes as the field `routed_experts` of a batch, in its mode `R3`, whichever pass they are of; it
finds the routers of its pipeline stage, deals out their layers and rows, and leaves the last row of each sequence to
them, whose log-prob nobody asks for. Other rows it cannot leave out. What it does not keep is what predictors are
fitted from and replay is judged by: hidden states, logits and the live choice. `MegatronRouters` reads them off the
routers, with the checks of `moe_replay.routing.observation`. Needs the extra `megatron`.

Shapes: T tokens of a sequence, R rows that reach a router of this rank in one forward, S of them watched, L MoE layers,
K experts per token, E experts, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_replay.engines.training_batch import PassRoutes
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.observation import Observer, RouterFeatures, require_no_strays, strays
from moe_replay.routing.row_routes import RowRoutes
from moe_replay.routing.selection import LogitCall, in_backward


def require_megatron_pass(asked: PassRoutes, fields: Mapping[str, Tensor]) -> None:
    """Refuse a pass that verl's Megatron engine has nothing for, before any rank is at it.

    Raises ConfigError for a predictor, RoutingMismatch as `require_whole_routes`.
    """
    if asked.predictor is not None:
        raise ConfigError(
            "a pass under a predictor routes by h (W + W_p), which verl's Megatron engine does not; take a run of "
            "training.engine = 'fsdp2' for predictions by the trainer (method.route_source = 'old_log_prob', "
            "counterfactual replay), or PR2, whose rollout is what predicts"
        )
    if "routed_experts" in fields:
        require_whole_routes(fields["routed_experts"])


def require_whole_routes(routes: Tensor) -> None:
    """Refuse routes, nested by sequence [tokens, L, K], that lack a row before the last: -1 is no expert of verl's.

    Raises RoutingMismatch.
    """
    for number, ids_TLK in enumerate(routes.unbind()):
        given_T = (ids_TLK >= 0).all(-1).all(-1)
        if not given_T[:-1].all():
            raise RoutingMismatch(
                f"verl's Megatron engine replays every row of a sequence but the last, and sequence {number} has "
                f"routes of {int(given_T.sum())} of its {len(given_T)} rows: sample it again whole, or train it with "
                "training.engine = 'fsdp2', which routes such rows live"
            )


def moe_layers(config: Any, pp_rank: int | None = None) -> tuple[int, ...]:
    """Decoder layer index of each MoE layer, ascending: of the model, or of a pipeline rank's stage."""
    from verl.utils.megatron.router_replay_utils import get_num_layers_to_build, is_moe_layer

    layers = range(config.num_layers)
    if pp_rank is not None:
        from megatron.core.transformer.transformer_layer import (  # pyright: ignore[reportMissingImports]
            get_transformer_layer_offset,
        )

        start = get_transformer_layer_offset(config, None, pp_rank)
        layers = range(start, start + get_num_layers_to_build(config, None, pp_rank))
    return tuple(layer for layer in layers if is_moe_layer(config, layer))


class MegatronRouters:
    """Watches the routers of a Megatron model, or of the chunks that a pipeline rank holds; replay stays verl's.

    What it tells is of the last forward of this rank and of its own rows: with pipeline stages of their layers.
    Recompute in backward is not watched.

    Raises ConfigError for a model without routers that can be replayed.
    """

    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer that is here, ascending; length L."""
    num_experts: int
    """E, of every router here."""
    top_k: int
    """K, experts per token."""
    hidden_size: int
    """H, of what the routers get."""

    def __init__(self, chunks: Sequence[nn.Module]):
        self._routers = dict(sorted(_routers(chunks)))
        self.layers = tuple(self._routers)
        if not self._routers or any(router.router_replay is None for router in self._routers.values()):
            raise ConfigError(
                f"routers are watched where they can be replayed, and of {len(self._routers)} here some can't or there "
                f"are none: build the model after verl's apply_router_replay_patch with moe_enable_routing_replay=True"
            )
        router = next(iter(self._routers.values()))
        self.num_experts, self.hidden_size = router.weight.shape
        self.top_k = router.topk
        self._observer = Observer()
        self._calls: dict[int, LogitCall] = {}
        self._live: dict[int, Tensor] = {}
        self._strays: dict[int, tuple[Tensor, int]] = {}
        self._handles = [chunk.register_forward_pre_hook(self._begin_forward) for chunk in chunks]
        for layer, router in self._routers.items():
            router.gating = self._watched_gating(layer, router.gating)
            router.router_replay.get_replay_topk = self._watched_choice(layer, router.router_replay.get_replay_topk)

    def remove(self) -> None:
        """Leave the routers as they were."""
        for handle in self._handles:
            handle.remove()
        for router in self._routers.values():
            del router.gating, router.router_replay.get_replay_topk
        self._routers = {}

    def watch(self, rows_S: Tensor) -> None:
        """Keep the features of these rows, int64 [S], in each forward that follows, until `forget`."""
        self._observer.watch(rows_S)

    def compare(self, ids_RLK: Tensor, present_R: Tensor) -> None:
        """Measure the coverage gap of these routes of the layers here in each forward that follows, until `forget`.

        Raises RoutingMismatch if shapes, id range or distinctness within a row do not fit the model.
        """
        self._observer.reference = RowRoutes(ids_RLK, present_R, self.num_experts, self.top_k, self.layers)

    def forget(self) -> None:
        """Keep nothing but choices in the forward passes that follow."""
        self._observer = Observer()
        self._calls, self._strays = {}, {}

    @property
    def live_RLK(self) -> Tensor:  # noqa: N802  (shape-suffixed)
        """The routers' own choice in the last forward, also under replay. -> int64 [R, L, K].

        Raises RoutingMismatch if a layer has not fired: fused routers choose out of reach.
        """
        self._require_whole()
        return torch.stack([self._live[layer] for layer in self.layers], dim=1)

    @property
    def features(self) -> RouterFeatures:
        """What the routers got and gave in the last forward for the rows watched.

        Raises RoutingMismatch without any, ConfigError where a choice was not that of the K largest logits.
        """
        self._require_whole()
        require_no_strays(self._strays)
        return self._observer.features(self.layers)

    @property
    def coverage_gap_RL(self) -> Tensor:  # noqa: N802  (shape-suffixed)
        """1 - Σ softmax(p) over the routes compared, in the last forward; NaN in rows without. -> float32 [R, L]."""
        self._require_whole()
        return self._observer.coverage_gap_RL(self.layers)

    def _require_whole(self) -> None:
        silent = [layer for layer in self.layers if layer not in self._live]
        if silent:
            raise RoutingMismatch(
                f"what routers did is told after a whole forward, but those of decoder layers {silent} have not chosen "
                "within reach: run the model first, with moe_router_fusion=False"
            )

    def _begin_forward(self, chunk: nn.Module, _args: Any) -> None:
        if not in_backward():
            # Of this chunk alone: those before it in the pipeline have told of the same forward already.
            for layer, _ in _routers([chunk]):
                for kept in (self._live, self._calls, self._strays):
                    kept.pop(layer, None)
                self._observer.drop(layer)

    def _watched_gating(self, layer: int, gating: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = gating(hidden, *args, **kwargs)
            if not in_backward():
                self._calls[layer] = LogitCall(hidden.detach().flatten(0, -2), logits.detach().flatten(0, -2))
            return logits

        return watched

    def _watched_choice(self, layer: int, choose: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            scores: Tensor, topk: int, num_groups: Any = None, group_topk: Any = None, default_compute_topk: Any = None
        ) -> Any:
            if not in_backward():
                own = scores.detach()
                self._see(layer, own, default_compute_topk(own, topk, num_groups=num_groups, group_topk=group_topk)[1])
            return choose(scores, topk, num_groups, group_topk, default_compute_topk)

        return watched

    def _see(self, layer: int, scores_RE: Tensor, live_RK: Tensor) -> None:
        call = self._calls[layer]
        self._live[layer] = live_RK
        self._observer.see(layer, scores_RE, call)
        if (rows_S := self._observer.rows_S) is not None:
            rows_S = rows_S.to(scores_RE.device)
            self._strays[layer] = strays(call.logits_RE[rows_S], scores_RE[rows_S], live_RK[rows_S]).sum(), len(rows_S)


def _routers(chunks: Sequence[nn.Module]) -> Iterator[tuple[int, Any]]:
    """(Decoder layer, router) of all routers but those of multi-token prediction, which count their layers anew."""
    from megatron.core.transformer.moe.router import TopKRouter  # pyright: ignore[reportMissingImports]

    for chunk in chunks:
        modules: Any = getattr(chunk, "decoder", chunk).modules()
        for module in modules:
            if isinstance(module, TopKRouter):
                yield module.layer_number - 1, module
