"""What verl's engines have in common here: passes as their batch says, and what routers saw by sequence.

Shapes: B sequences of a micro-batch, R rows that reach the routers of this rank, L MoE layers, K experts per token.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.utils.losses import ppo_loss

from moe_replay.engines.ranks import RouterShape
from moe_replay.engines.row_layout import RowLayout
from moe_replay.engines.training_batch import NO_ROUTE
from moe_replay.engines.verl_settings import actor_config

MODEL_TYPE = "replayed_language_model"


class ObservedPasses:
    """Laid over an engine of verl, whose own methods it calls; `routers` are those of its live model."""

    routers: Any

    def release(self) -> None:
        """Let go of model and optimizer, so that others can be built in their room."""
        if routers := self.__dict__.pop("routers", None):  # none before the first model
            routers.remove()  # they hold the decoder
        engine: Any = self
        engine.module = engine.optimizer = engine.lr_scheduler = engine.checkpoint_manager = None
        gc.collect()

    @property
    def router_shape(self) -> RouterShape:
        """Of the model that was built."""
        routers = self.routers
        return RouterShape(routers.num_experts, routers.top_k, routers.layers, routers.hidden_size)

    def score(self, batch: TensorDict) -> Any:
        """verl's output of a pass without gradient."""
        engine: Any = self
        with engine.eval_mode():
            return engine.infer_batch(batch)

    def step(self, batch: TensorDict) -> Any:
        """verl's output of one optimizer step, seen before the weights changed."""
        engine: Any = self
        method: Any = tu.get_non_tensor_data(batch, "method", None)
        factor: Any = tu.get_non_tensor_data(batch, "lr_factor", 1.0)
        sequences: Any = tu.get_non_tensor_data(batch, "global_batch_size", None)
        with engine.train_mode():
            with scaled_learning_rate(engine.optimizer, factor):
                output = engine.train_batch(batch, partial(ppo_loss, actor_config(method, sequences)))
            engine.lr_scheduler_step()
        return output

    def _observe(self, micro_batch: TensorDict, rows: RowLayout) -> None:
        """Have the routers keep what the micro-batch asks for."""
        given = micro_batch.keys()
        self.routers.forget()
        if "reference_experts" in given:
            self.routers.compare(*self._routes_here(micro_batch["reference_experts"], rows))
        elif "routed_experts" in given:
            self._compare_with_replayed(micro_batch, rows)
        if "sampled_rows" in given:
            sampled: Any = micro_batch["sampled_rows"]
            self.routers.watch(rows.to_rows(sampled.values(), False).nonzero()[:, 0].to(get_device_id()))

    def _compare_with_replayed(self, micro_batch: TensorDict, rows: RowLayout) -> None:
        self.routers.compare(*self._routes_here(micro_batch["routed_experts"], rows))

    def _routes_here(self, nested: Any, rows: RowLayout) -> tuple[Tensor, Tensor]:
        """`row_routes` of the layers whose routers are on this rank."""
        return row_routes(nested, rows)

    def _seen(self, micro_batch: TensorDict, rows: RowLayout) -> dict[str, Tensor]:
        """What the routers saw of the tokens, nested by sequence."""
        given = micro_batch.keys()
        input_ids: Any = micro_batch["input_ids"]
        seen = self._seen_of_rows(micro_batch)
        by_sequence = {name: _nested(rows.to_tokens(values), input_ids.offsets()) for name, values in seen.items()}
        if "sampled_rows" in given:
            sampled: Any = micro_batch["sampled_rows"]
            features = self.routers.features
            counts = torch.tensor([0, *(int(flags.sum()) for flags in sampled.unbind())])
            for name, values in (("router_hidden", features.hidden_SLH), ("router_logits", features.logits_SLE)):
                watched = rows.watched_to_tokens(values, sampled.values())
                by_sequence[name] = _nested(watched.cpu(), counts.cumsum(0))
        return by_sequence

    def _seen_of_rows(self, micro_batch: TensorDict) -> dict[str, Tensor]:
        """What the routers saw of each row [R, L, ...]."""
        given = micro_batch.keys()
        seen = {"live_experts": self.routers.live_RLK.to(torch.int32)}
        if "reference_experts" in given or "routed_experts" in given:
            seen["coverage_gap"] = self.routers.coverage_gap_RL
        return seen


@contextmanager
def scaled_learning_rate(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rate of all groups of parameters, for a while."""
    groups = optimizer.param_groups
    scheduled = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= factor
    try:
        yield
    finally:
        for group, learning_rate in zip(groups, scheduled, strict=True):
            group["lr"] = learning_rate


def row_routes(nested: Any, rows: RowLayout) -> tuple[Tensor, Tensor]:
    """int64 ids [R, L, K] and, per row, whether it has a route: padding and rows of `NO_ROUTE` have none."""
    ids_RLK = rows.to_rows(nested.values().to(torch.int64), NO_ROUTE).to(get_device_id())
    return ids_RLK.clamp_min(0), (ids_RLK != NO_ROUTE).all(-1).all(-1)


def _nested(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets.to(values.device))
