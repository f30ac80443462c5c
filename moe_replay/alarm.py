"""The stability alarm, as settings: which mismatch is too much to train on, and what becomes of such a batch.

`docs/stability.md` says what it sees and when.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from moe_replay.methods import Method
from moe_replay.settings import Config

Action = Literal["train", "skip", "lower_lr", "fall_back"]
"""What may become of a batch: trained on all the same, not at all, with a lower learning rate, or under the routes of
the rollout."""

ALARM_METRIC = "alarm/raised"
"""Metric of a training whose batch passed a bound; the key of `docs/methods.md`."""


class Excess(NamedTuple):
    """A metric beyond its bound."""

    metric: str
    value: float
    bound: float


class AlarmConfig(Config):
    """When a batch is too far from the policy that sampled it to be trained on, and what is done then."""

    kl_k3: NonNegativeFloat | None = None
    """Bound on `mismatch/kl_k3` of a batch; none watches nothing."""
    extreme_fraction: float | None = Field(default=None, ge=0, le=1)
    """Bound on `mismatch/extreme_fraction` of a batch; none watches nothing."""
    rule: Literal["pause", "skip", "lower_lr", "fall_back"] = "pause"
    """What is done about a batch beyond a bound: wait for a person to decide, leave the batch out, train on it with a
    lower learning rate, or train on it under the routes of the rollout (r3), for methods that replay others or none."""
    lr_factor: float = Field(default=0.1, gt=0, lt=1)
    """What `lower_lr` multiplies the learning rate of that iteration by."""
    wait_seconds: PositiveInt = 24 * 3600
    """How long a paused flow run waits for a decision before it fails; the iteration can be decided on after, too."""

    @field_validator("kl_k3", "extreme_fraction", mode="before")
    @classmethod
    def _none_in_words(cls, bound: Any) -> Any:
        return None if bound == "none" else bound  # TOML has no null

    def excess(self, metrics: Mapping[str, float]) -> Excess | None:
        """The first metric that is beyond its bound, or None."""
        bounds = {"mismatch/kl_k3": self.kl_k3, "mismatch/extreme_fraction": self.extreme_fraction}
        for metric, bound in bounds.items():
            if bound is not None and metrics[metric] > bound:
                return Excess(metric, metrics[metric], bound)
        return None


def actions_for(method: Method, fallen_back: bool = False) -> tuple[Action, ...]:
    """What can be done with a batch: `fall_back` only where the rollout's routes are not replayed already."""
    return ("train", "skip", "lower_lr", *(() if fallen_back or method.route_source == "rollout" else ("fall_back",)))
