"""Predicted routing as weights: a router that holds W + W_p routes by h (W + W_p) = p + h W_p.

So the inference engine predicts at no cost, on any kernel and any parallel layout, once it has loaded W + W_p for W.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moe_replay.engines.gates import RouterTensor, router_matrices, router_tensors
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.predictor import EvolutionPredictor


class MergedGates:
    """The routers of a checkpoint, each with an evolution predictor W_p added to its weight W."""

    def __init__(self, folder: Path, predictor: Path | None, layers: Sequence[int]):
        """`layers`: decoder layers of the model that have experts, ascending. Without a predictor nothing is added.

        Raises RoutingMismatch when the predictor is of a model with other layers or routers of another [E, H], and
        ArchiveCorrupt when its file isn't whole.
        """
        self._folder = folder
        self._parts: dict[int, tuple[RouterTensor, Tensor]] = {}
        """Weight W and W_p, float32 [E, H], of each layer that has a predictor."""
        if predictor is not None:
            fitted, routers = EvolutionPredictor.load(predictor), router_matrices(folder, layers)
            for router in routers.values():
                num_experts, hidden_size = router.shape
                fitted.require_model(num_experts, hidden_size, layers)
            self._parts = {layer: (routers[layer], weight_EH) for layer, weight_EH in fitted.weights.items()}

    def merge(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The (name, tensor) pairs of the checkpoint as given, the routers' weights replaced by W + W_p in float32.

        Raises RoutingMismatch at the end when a router's weight was not among them.
        """
        pending = {router.name: predicted_EH for router, predicted_EH in self._parts.values()}
        for name, tensor in weights:
            predicted_EH = pending.pop(name, None)
            yield name, tensor if predicted_EH is None else tensor.float() + predicted_EH.to(tensor.device)
        if pending:
            raise RoutingMismatch(
                f"every predicted router's weight is loaded with its checkpoint; the engine has not read "
                f"{sorted(pending)} from the safetensors files of {self._folder}: leave no other weights there"
            )

    def router_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all that belongs to routers in the checkpoint; nothing else is read."""
        for router in router_tensors(self._folder):
            yield router.name, _read(router)

    def fidelity(self, precision: Mapping[int, torch.dtype]) -> float | None:
        """Share of W_p that survives the precision in which an engine holds its routers, by decoder layer.

        1 - ‖(round(W + W_p) - round(W)) - W_p‖² / ‖W_p‖² over all layers; below 0 when rounding adds more than it
        keeps. None when W_p is zero.
        """
        lost = total = 0.0
        for layer, (router, predicted_EH) in self._parts.items():
            own_EH, dtype = _read(router).float(), precision[layer]
            change_EH = (own_EH + predicted_EH).to(dtype).double() - own_EH.to(dtype).double()
            lost += float((change_EH - predicted_EH.double()).square().sum())
            total += float(predicted_EH.double().square().sum())
        return 1 - lost / total if total else None


def _read(router: RouterTensor) -> Tensor:
    with safe_open(router.file, framework="pt") as file:
        return file.get_tensor(router.name)
