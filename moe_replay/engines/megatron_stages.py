"""What the routers of all pipeline stages saw of a batch, brought together on the last, which has the log-probs.

Shapes: B sequences of a micro-batch, T tokens of all sequences, P of them sampled, L MoE layers, K experts per token,
E experts, H hidden size.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from verl.utils.device import get_device_id

from moe_replay.engines.megatron_replay import moe_layers


class StageObservation:
    """Filled with one micro-batch after the other on each rank, then asked once on all ranks of a pipeline together."""

    def __init__(self) -> None:
        self._by_place: dict[str, dict[int, Tensor]] = {}

    def add(self, places_B: Tensor, seen: dict[str, Tensor]) -> None:
        """What was seen of a micro-batch, nested by sequence [tokens, L here, ...], and its sequences' places."""
        for name, nested in seen.items():
            self._by_place.setdefault(name, {}).update(zip(places_B.tolist(), nested.unbind(), strict=True))

    def of_all_stages(self, config: Any) -> dict[str, Tensor]:
        """By name, nested by sequence in the order of the batch [tokens, L of the model, ...].

        Args:
            config: Megatron-Core's of the model.
        """
        whole = {}
        for name, by_place in sorted(self._by_place.items()):
            parts = [by_place[place] for place in sorted(by_place)]
            bounds = torch.tensor([0, *accumulate(len(part) for part in parts)])
            values = _over_stages(torch.cat(parts), config)
            whole[name] = torch.nested.nested_tensor_from_jagged(values, bounds.to(values.device))
        return whole


def _over_stages(values: Tensor, config: Any) -> Tensor:
    """[T, L here, ...] of each rank of a pipeline -> [T, L of the model, ...]."""
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1:
        return values
    group = parallel_state.get_pipeline_model_parallel_group()
    own = parallel_state.get_pipeline_model_parallel_rank()
    parts = []
    for stage in range(stages):
        shape = len(values), len(moe_layers(config, stage)), *values.shape[2:]
        part = values.contiguous() if stage == own else values.new_empty(shape)
        part = part.to(get_device_id())
        torch.distributed.broadcast(part, torch.distributed.get_global_rank(group, stage), group)
        parts.append(part.to(values.device))
    return torch.cat(parts, dim=1)
