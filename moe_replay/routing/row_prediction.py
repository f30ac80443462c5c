"""Experts that predicted gates choose for the rows that one forward brings to the routers (PR2, arXiv 2606.00395).

Shapes: R rows a router sees in one forward (those of its rank, pads included), P of them predicted, E experts,
K experts per token, H hidden size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_replay.errors import RoutingMismatch
from moe_replay.routing.selection import LogitCall


class RowPrediction:
    """A predictor W_p [E, H] by decoder layer, for the rows that `present_R` names; layers of zeros are left out.

    Raises RoutingMismatch for layers or shapes that the model does not have.
    """

    def __init__(
        self,
        predictor: Mapping[int, Tensor],
        present_R: Tensor,
        num_experts: int,
        hidden_size: int,
        layers: tuple[int, ...],
    ):
        foreign = {
            layer: list(weight.shape)
            for layer, weight in predictor.items()
            if layer not in layers or weight.shape != (num_experts, hidden_size)
        }
        if foreign:
            raise RoutingMismatch(
                f"a predictor of this model has [E={num_experts}, H={hidden_size}] in some of decoder layers "
                f"{list(layers)}, but this one has {foreign}: it was fitted for another model"
            )
        self._weights = {layer: weight.detach().float() for layer, weight in predictor.items() if weight.any()}
        self._present_R1 = present_R[:, None]
        self.rows_P = present_R.nonzero()[:, 0]

    def __contains__(self, layer: int) -> bool:
        return layer in self._weights

    def at(self, layer: int, call: LogitCall, top_k: int) -> tuple[Tensor, Tensor]:
        """Ids [R, K] of topk(p + h W_p) in a predicted layer, in float32, and which rows they are for, [R, 1].

        Raises RoutingMismatch when the rows that reach the router are not R.
        """
        rows, device = len(call.logits_RE), call.logits_RE.device
        if len(self._present_R1) != rows:
            raise RoutingMismatch(
                f"R={len(self._present_R1)} rows are predicted or not but {rows} reach the router of decoder layer "
                f"{layer}: give one flag per row as this rank's model gets them"
            )
        # Across devices once, not once a forward.
        weight_EH = self._weights[layer] = self._weights[layer].to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            drift_RE = torch.nn.functional.linear(call.hidden_RH.float(), weight_EH)
            ids_RK = (call.logits_RE.float() + drift_RE).topk(top_k, dim=-1).indices
        return ids_RK, self._present_R1.to(device)
