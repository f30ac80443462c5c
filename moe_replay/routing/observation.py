"""What a forward pass keeps of its routers beyond their choice: logits and inputs of some rows, and coverage gaps.

Shapes: R rows a router sees in one forward, S rows watched, L MoE layers, E experts, K experts per token,
H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.row_routes import RowRoutes
from moe_replay.routing.selection import LogitCall

_ROUNDING = 4
"""Steps of their precision by which equal scores may seem to differ."""


@dataclass(frozen=True)
class RouterFeatures:
    """What the routers got and gave for S tokens: h and p = h W of PR2 (arXiv 2606.00395), float32."""

    hidden_SLH: Tensor
    logits_SLE: Tensor


class Observer:
    """Takes from each layer of a forward what was asked for, and holds it until the next forward."""

    def __init__(self) -> None:
        self.rows_S: Tensor | None = None
        """Rows whose features are kept; set by `watch`."""
        self.reference: RowRoutes | None = None
        """Routes whose coverage gap is measured."""
        self._last_row = -1
        self._features: dict[int, tuple[Tensor, Tensor]] = {}
        self._gaps: dict[int, Tensor] = {}

    def watch(self, rows_S: Tensor) -> None:
        """Keep the features of these rows, int64 [S]."""
        self.rows_S = rows_S
        self._last_row = int(rows_S.max()) if rows_S.numel() else -1  # once: a layer should not wait for a device

    @property
    def asked(self) -> bool:
        """Whether anything is to be kept."""
        return self.rows_S is not None or self.reference is not None

    def clear(self) -> None:
        """Drop what the last forward gave."""
        self._features, self._gaps = {}, {}

    def drop(self, layer: int) -> None:
        """Drop what the last forward gave of one layer."""
        self._features.pop(layer, None)
        self._gaps.pop(layer, None)

    def see(self, layer: int, scores_RE: Tensor, call: LogitCall | None) -> None:
        """Keep of a layer what is asked for; raises RoutingMismatch for rows that the forward does not have.

        ConfigError for features of a router without a linear map; its coverage gap is NaN.
        """
        if self.rows_S is not None:
            call = require_call(layer, call)
            if self._last_row >= len(scores_RE):
                raise RoutingMismatch(
                    f"row {self._last_row} is watched but {len(scores_RE)} rows reach the router of decoder "
                    f"layer {layer}: name rows as this rank's model gets them"
                )
            rows_S = self.rows_S.to(scores_RE.device)
            self._features[layer] = call.hidden_RH[rows_S].float(), call.logits_RE[rows_S].float()
        if self.reference is not None:
            ids_RK, present_R1 = self.reference.at(layer, scores_RE)
            self._gaps[layer] = _coverage_gap(call, ids_RK, present_R1)

    def features(self, layers: tuple[int, ...]) -> RouterFeatures:
        """Of the last forward; raises RoutingMismatch unless rows were watched in all of these layers."""
        if len(self._features) != len(layers):
            raise RoutingMismatch("features exist after a whole forward that was told to watch rows: watch, then run")
        pairs = [self._features[layer] for layer in layers]
        return RouterFeatures(*(torch.stack(part, dim=1) for part in zip(*pairs, strict=True)))

    def coverage_gap_RL(self, layers: tuple[int, ...]) -> Tensor:  # noqa: N802  (shape-suffixed)
        """Of the last forward; raises RoutingMismatch unless it was compared in all of these layers."""
        if len(self._gaps) != len(layers):
            raise RoutingMismatch("coverage gaps exist after a whole forward that was compared: compare, then run")
        return torch.stack([self._gaps[layer] for layer in layers], dim=1)


def require_call(layer: int, call: LogitCall | None) -> LogitCall:
    """The layer's linear map; raises ConfigError when its router makes none."""
    if call is None:
        raise ConfigError(
            f"features and predictions are read off a router's linear map, but that of decoder layer {layer} calls no "
            "torch.nn.functional.linear with its [E, H] weight before it chooses: record no router evolution of this "
            "model and use a method without a predictor (r3)"
        )
    return call


def strays(logits_RE: Tensor, scores_RE: Tensor, ids_RK: Tensor) -> Tensor:
    """Rows whose choice by scores is not one of K largest logits, ties within rounding aside. -> bool [R]."""
    lowest_R1, at_R1 = logits_RE.gather(-1, ids_RK).min(-1, keepdim=True)
    highest_R1, rival_R1 = logits_RE.scatter(-1, ids_RK, -torch.inf).max(-1, keepdim=True)
    chosen_R1 = scores_RE.gather(-1, ids_RK.gather(-1, at_R1))
    lead_R1 = chosen_R1 - scores_RE.gather(-1, rival_R1)
    # A score that grows with the logit leaves a larger logit behind only where it rounds both to about the same.
    rounding_R1 = _ROUNDING * torch.finfo(scores_RE.dtype).eps * chosen_R1.abs()
    return ((highest_R1 > lowest_R1) & (lead_R1 > rounding_R1))[:, 0]


def require_no_strays(counts: dict[int, tuple[Tensor, int]]) -> None:
    """Raise ConfigError for layers that chose otherwise than by the largest logits: by layer, how many of how many."""
    if not counts:
        return
    found = torch.stack([count for count, _ in counts.values()]).tolist()
    straying = {layer: of for (layer, of), count in zip(counts.items(), found, strict=True) if count}
    if straying:
        layer, (count, rows) = next(iter(straying.items()))
        raise ConfigError(
            f"features and predictions hold for routers that choose the K largest logits, but that of decoder layer "
            f"{layer} chose others in {int(count)} of {rows} rows (one of {len(straying)} such layers): a selection "
            "bias or expert groups take part; record no router evolution of this model and use a method without a "
            "predictor (r3)"
        )


def _coverage_gap(call: LogitCall | None, ids_RK: Tensor, present_R1: Tensor) -> Tensor:
    """1 - the share of softmax(logits) that falls on ids; NaN without logits or a route. -> float32 [R]."""
    if call is None:
        return torch.full((len(ids_RK),), torch.nan, device=ids_RK.device)
    shares_RE = call.logits_RE.softmax(-1, dtype=torch.float32)
    covered_RK = shares_RE.gather(-1, torch.where(present_R1, ids_RK, 0))
    return torch.where(present_R1[:, 0], (1 - covered_RK.sum(-1)).clamp_min(0), torch.nan)
