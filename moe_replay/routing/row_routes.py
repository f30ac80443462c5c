"""Routes for the rows that one forward brings to the routers, checked against the model they are for.

Shapes: R rows a router sees in one forward (those of its rank, pads included), L MoE layers, E experts,
K experts per token.
"""

import torch
from torch import Tensor

from moe_replay.errors import RoutingMismatch


class RowRoutes:
    """Expert ids of R rows by decoder layer, and which rows have any.

    ids_RLK: int64 [R, L, K], distinct within a row, in any order, which is kept. present_R: bool [R]; ids of rows
    that are False mean nothing. Raises RoutingMismatch if shapes, dtype, id range or distinctness do not fit.
    """

    def __init__(self, ids_RLK: Tensor, present_R: Tensor, num_experts: int, top_k: int, layers: tuple[int, ...]):
        _check_shapes(ids_RLK, present_R, top_k, layers)
        _check_ids(ids_RLK[present_R.to(ids_RLK.device)], num_experts)
        self._ids = dict(zip(layers, ids_RLK.unbind(1), strict=True))
        self._present_R1 = present_R[:, None]

    def at(self, layer: int, scores_RE: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [R, K] and presence [R, 1] in a decoder layer whose router scores these rows, on their device.

        Raises RoutingMismatch when the rows that reach the router are not R.
        """
        ids_RK, present_R1 = self._ids[layer].to(scores_RE.device), self._present_R1.to(scores_RE.device)
        if ids_RK.shape[0] != scores_RE.shape[0]:
            raise RoutingMismatch(
                f"routes have R={ids_RK.shape[0]} rows but {scores_RE.shape[0]} reach the router of decoder layer "
                f"{layer}: build targets for the rows as this rank's model gets them"
            )
        return ids_RK, present_R1


def _check_shapes(ids_RLK: Tensor, present_R: Tensor, top_k: int, layers: tuple[int, ...]) -> None:
    if ids_RLK.dtype != torch.int64 or present_R.dtype != torch.bool:
        raise RoutingMismatch(
            f"routes are int64 and their presence bool, got {ids_RLK.dtype} and {present_R.dtype}: "
            "widen stored ids before replaying them"
        )
    if ids_RLK.ndim != 3 or ids_RLK.shape[1:] != (len(layers), top_k):
        raise RoutingMismatch(
            f"routes have shape {list(ids_RLK.shape)} but the model needs [R, L={len(layers)}, K={top_k}] "
            f"(decoder layers {list(layers)}): they were recorded on another model or layer map"
        )
    if present_R.shape != ids_RLK.shape[:1]:
        raise RoutingMismatch(
            f"presence has shape {list(present_R.shape)} but the routes have R={ids_RLK.shape[0]} rows: "
            "give one flag per row, pads included"
        )


def _check_ids(ids_PLK: Tensor, num_experts: int) -> None:
    """Range and distinctness of the P rows that are present."""
    sorted_PLK = ids_PLK.sort(-1).values
    if sorted_PLK.numel() and (sorted_PLK.min() < 0 or sorted_PLK.max() >= num_experts):
        raise RoutingMismatch(
            f"expert ids span {int(sorted_PLK.min())}..{int(sorted_PLK.max())} but the model has "
            f"E={num_experts} (0..{num_experts - 1}): mark rows without a route as not present"
        )
    repeated = int((sorted_PLK[..., 1:] == sorted_PLK[..., :-1]).any(-1).sum())
    if repeated:
        rows, num_layers, top_k = ids_PLK.shape
        raise RoutingMismatch(
            f"the K={top_k} experts of a route are distinct, but {repeated} of {rows * num_layers} (row, layer) "
            "repeat one: rows were filled, not captured; mark them as not present"
        )
