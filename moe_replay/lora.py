"""LoRA as settings: which low-rank adapters are trained in place of the model's weights."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from moe_replay.router_names import ROUTER_NAMES
from moe_replay.settings import Config

LINEAR, EXPERTS = "linear", "experts"
"""Targets that stand for many: linear maps that are of no routed expert, and the weights of routed experts."""


class LoraConfig(Config):
    """Low-rank adapters that are trained while the model's weights stay as they are (LoRA, arXiv 2106.09685)."""

    rank: NonNegativeInt = 0
    """Rank of each adapter; 0 trains the weights themselves."""
    alpha: PositiveInt = 32
    """An adapter is added to its weight scaled by alpha / rank."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(LINEAR, EXPERTS), min_length=1)
    """Weights of the decoder layers that get an adapter: `linear` (attention, and MLPs that are no routed experts),
    `experts` (each routed expert), or ends of their paths, such as `q_proj` or `experts.down_proj`."""
    train_routers: bool = False
    """Train the routers' own weights beside the adapters; else routers stay as they are."""

    @field_validator("targets")
    @classmethod
    def _routers_take_no_adapters(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        named = [target for target in targets if {*ROUTER_NAMES} & {*target.split(".")}]
        if named:
            raise ValueError(
                f"{', '.join(named)} would be routers, which are trained whole or not at all: leave them out, and set "
                "training.lora.train_routers = true to train them"
            )
        return targets

    @model_validator(mode="after")
    def _is_on_where_it_says_how(self) -> "LoraConfig":
        if not self.rank and self != LoraConfig.model_construct():
            raise ValueError(
                "rank = 0 trains all weights of the model, and the other keys of training.lora say how adapters are "
                "trained in their place: give a rank, for example 16, or leave them out"
            )
        return self
