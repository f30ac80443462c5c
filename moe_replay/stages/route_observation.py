"""What an iteration's passes show of its routes, gathered mini-batch by mini-batch into `RoutingStatistics`.

Shapes: T tokens of one mini-batch, L MoE layers, K experts per token, E experts, D bins of deviation.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe_replay.engines.training import Pass
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.metrics import deviation_by_layer, expert_load, load_imbalance, topk_agreement
from moe_replay.routing.statistics import MiniStepRouting, RoutingStatistics
from moe_replay.routing.trace import RoutingTrace

Metrics = dict[str, float]
Traces = list[RoutingTrace]


@dataclass
class RouteObservation:
    """Rollout against trainer in the old log-prob pass, then the reference against the live routers by mini-step."""

    layers: tuple[int, ...]
    num_experts: int
    _differing_B: Tensor = field(init=False)
    _differs_L: Tensor = field(init=False)
    _load_LE: Tensor = field(init=False)
    _tokens: int = 0
    _captured: int = 0
    _counted: list[Tensor] = field(default_factory=list)
    """By mini-batch, which tokens the rollout has a route of: the rows that all methods are compared on."""
    _mini_steps: list[MiniStepRouting] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_layers = len(self.layers)
        self._differing_B = torch.zeros(num_layers + 1, dtype=torch.int64)
        self._differs_L = torch.zeros(num_layers, dtype=torch.int64)
        self._load_LE = torch.zeros((num_layers, self.num_experts), dtype=torch.int64)

    def add_old_pass(self, captured: Traces, seen: Pass) -> None:
        """Compare the routes of one mini-batch's rollout with the trainer's own choice at the same weights."""
        ids_TLK, valid_T = join(captured)
        differs_TL = topk_agreement(ids_TLK[valid_T], seen.live_TLK[valid_T].long()) < 1
        self._counted.append(valid_T)
        self._tokens += len(valid_T)
        self._captured += int(valid_T.sum())
        self._differs_L += differs_TL.sum(0)
        self._differing_B += torch.bincount(differs_TL.sum(-1), minlength=len(self.layers) + 1)
        self._load_LE += expert_load(ids_TLK[valid_T], self.num_experts)

    def add_mini_step(self, reference: Traces, seen: Pass) -> Metrics:
        """Compare the reference of one mini-batch with the live routers; returns the mini-step's `routing/*`.

        The mini-batches come as in the old log-prob pass. Raises RoutingMismatch when none of its tokens has a route.
        """
        ids_TLK, valid_T = join(reference)
        # The trainer's own routes have rows that the rollout lacks.
        valid_T &= self._counted[len(self._mini_steps)]
        if not valid_T.any():
            raise RoutingMismatch(
                f"none of the {len(valid_T)} tokens of mini-step {len(self._mini_steps) + 1} has a recorded route, so "
                "nothing was replayed; the rollout ran without capture: run it again"
            )
        ids_TLK, live_TLK = ids_TLK[valid_T], seen.live_TLK[valid_T].long()
        coverage_gap_L = seen.coverage_gap_TL[valid_T].double().mean(0)
        step = MiniStepRouting(
            agreement_L=tuple(topk_agreement(ids_TLK, live_TLK).double().mean(0).tolist()),
            coverage_gap_L=tuple(coverage_gap_L.tolist()) if coverage_gap_L.isfinite().all() else (),
            deviation_LD=tuple(tuple(row) for row in deviation_by_layer(ids_TLK, live_TLK).tolist()),
        )
        self._mini_steps.append(step)
        return mini_step_metrics(step)

    def metrics(self) -> Metrics:
        """`mismatch/*` of routers over all captured tokens, and load and missing rows of the rollout."""
        layers_differing = torch.arange(len(self.layers) + 1)
        captured = max(self._captured, 1)
        per_token = (self._differing_B * layers_differing).sum().item() / captured
        return {
            "mismatch/router_fraction": per_token / len(self.layers),
            "mismatch/token_fraction": self._differing_B[1:].sum().item() / captured,
            "mismatch/routers_per_token": per_token,
            "routing/load_imbalance": load_imbalance(self._load_LE),
            "routing/missing_fraction": 1 - self._captured / self._tokens,
        }

    def statistics(self) -> RoutingStatistics:
        """All of it, by layer."""
        return RoutingStatistics(
            layers=self.layers,
            router_fraction_L=tuple((self._differs_L / max(self._captured, 1)).tolist()),
            differing_layers_B=tuple(self._differing_B.tolist()),
            load_LE=tuple(tuple(row) for row in self._load_LE.tolist()),
            mini_steps=tuple(self._mini_steps),
        )


def mini_step_metrics(step: MiniStepRouting) -> Metrics:
    """`routing/agreement`, `coverage_gap` and `deviation_*` of one mini-step: means over layers."""
    none, one, two, more = np.mean(step.deviation_LD, axis=0).tolist()
    metrics = {
        "routing/agreement": float(np.mean(step.agreement_L)),
        "routing/deviation_0": none,
        "routing/deviation_1": one,
        "routing/deviation_2": two,
        "routing/deviation_3plus": more,
    }
    gap = {"routing/coverage_gap": float(np.mean(step.coverage_gap_L))} if step.coverage_gap_L else {}
    return metrics | gap


def join(traces: Traces) -> tuple[Tensor, Tensor]:
    """Ids int64 [T, L, K] and validity [T] of all traces, one after the other."""
    whole = RoutingTrace.concatenate(traces)
    return torch.from_numpy(whole.ids_TLK.astype("int64")), torch.from_numpy(whole.valid_T.copy())
