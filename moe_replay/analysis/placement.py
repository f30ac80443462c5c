"""Where experts go: a plan that spreads known loads over devices, with replicas of the hottest in spare slots.

A device has the same number of slots as any other, and each slot holds one expert. The load of an expert splits evenly
over its replicas, as DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB) has it. Everything is deterministic: ties
go to the lower id.

Legend: L MoE layers, E experts, S slots of all devices together, D devices.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_replay.errors import ConfigError

Loads = npt.NDArray[np.integer] | npt.NDArray[np.floating]
Placement = tuple[tuple[int, ...], ...]
"""Ids of the experts of each device, ascending; a replica is an id named again."""

_LEAST_GAIN = 1e-9
"""Share of the highest load by which a change must lower it: less is the rounding of sums."""
_NEAR_BOUND = 1e-3
"""Share above what no plan can beat at which the search ends."""
_TRIED = 8
"""Changes of a replica that are tried with swaps after it, the best before swaps first."""


class LayerPlacement(BaseModel):
    """The experts of one MoE layer by device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    """Decoder layer index."""
    devices: Placement


class ExpertPlan(BaseModel):
    """Which device holds which experts, in each MoE layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: int = Field(ge=1)
    devices: int = Field(ge=1)
    slots: int = Field(ge=1)
    """Of all devices together, in one layer."""
    layers: tuple[LayerPlacement, ...]

    @model_validator(mode="after")
    def _holds_every_expert(self) -> "ExpertPlan":
        for layer in self.layers:
            sizes, held = {len(experts) for experts in layer.devices}, {e for d in layer.devices for e in d}
            whole = held == set(range(self.num_experts))
            if not whole or len(layer.devices) != self.devices or sizes != {self.slots // self.devices}:
                raise ValueError(
                    f"layer {layer.layer} places {len(held)} experts on {len(layer.devices)} devices of {sizes} slots; "
                    f"expected each of {self.num_experts} on {self.devices} devices of {self.slots // self.devices}"
                )
        return self


def check_slots(num_experts: int, devices: int, slots: int) -> None:
    """Raise ConfigError unless devices share the slots evenly, and these hold each expert at least once."""
    if devices < 1:
        raise ConfigError(f"{devices} devices can't hold experts; give at least 1")
    if slots < num_experts:
        raise ConfigError(f"{slots} slots don't hold {num_experts} experts; give at least {num_experts} slots")
    if slots > num_experts * devices:
        raise ConfigError(
            f"{slots} slots are more than {num_experts * devices}, with which each of {devices} devices holds all "
            f"{num_experts} experts; give fewer slots"
        )
    if slots % devices:
        nearest = -(-slots // devices) * devices
        fitting = [str(n) for n in range(devices, 0, -1) if slots % n == 0][:1]
        raise ConfigError(
            f"{devices} devices can't share {slots} slots evenly; give {nearest} slots, which leaves "
            f"{nearest - num_experts} for replicas, or {fitting[0]} devices"
        )


def linear_placement(num_experts: int, devices: int) -> Placement:
    """Consecutive experts on each device, the first devices taking one more where it doesn't divide.

    What expert parallelism does unless told otherwise (vLLM's expert placement strategy `linear`).
    """
    return tuple(tuple(part.tolist()) for part in np.array_split(np.arange(num_experts), devices))


def round_robin_placement(num_experts: int, devices: int) -> Placement:
    """Expert e on device e mod D (vLLM's expert placement strategy `round_robin`)."""
    return tuple(tuple(range(device, num_experts, devices)) for device in range(devices))


def shares_of(placement: Placement, num_experts: int) -> npt.NDArray[np.float64]:
    """What share of each expert's load each device serves -> [E, D]; an expert's shares sum to 1."""
    shares_ED = np.zeros((num_experts, len(placement)))
    for device, experts in enumerate(placement):
        np.add.at(shares_ED[:, device], list(experts), 1.0)
    return shares_ED / shares_ED.sum(axis=1, keepdims=True)


def plan_experts(load_LE: Loads, layers: Sequence[int], devices: int, slots: int) -> ExpertPlan:
    """A plan for each MoE layer from its load, tokens per expert.

    Raises ConfigError as `check_slots` does.
    """
    num_experts = load_LE.shape[1]
    placements = [plan_layer(load_E, devices, slots) for load_E in load_LE]
    return ExpertPlan(
        num_experts=num_experts,
        devices=devices,
        slots=slots,
        layers=tuple(
            LayerPlacement(layer=layer, devices=placement) for layer, placement in zip(layers, placements, strict=True)
        ),
    )


def plan_layer(load_E: Loads, devices: int, slots: int) -> Placement:
    """Experts by device such that the highest load of a device is low, never above that of round robin.

    Spare slots go, one by one, to the expert with the largest load per replica; then the heaviest replica goes to the
    least loaded device with room (longest processing time first). From there it goes on while it lowers the highest
    load: replicas of the most loaded device are swapped with others, and slots of one expert given to another.
    Raises ConfigError as `check_slots` does.
    """
    num_experts = len(load_E)
    check_slots(num_experts, devices, slots)
    replicas_E = _replicas(load_E, devices, slots)
    expert_S = np.repeat(np.arange(num_experts), replicas_E)
    found = _Slots(expert_S, _longest_first(load_E, expert_S, devices), load_E, devices)
    found.swap()
    # Its replicas are the lightest that so many slots allow.
    bound = max(load_E.sum() / devices, float((load_E / replicas_E).max()))
    while found.highest > bound * (1 + _NEAR_BOUND) and (better := found.with_another_replica()):
        found = better
    round_robin = _padded_round_robin(load_E, devices, slots)
    if found.highest > round_robin.highest:
        round_robin.swap()
        found = round_robin
    return found.placement()


class _Slots:
    """Slots with their experts and devices, and what each device bears."""

    def __init__(
        self, expert_S: npt.NDArray[np.int64], device_S: npt.NDArray[np.int64], load_E: Loads, devices: int
    ) -> None:
        self.expert_S = expert_S
        self.device_S = device_S
        self._load_E = load_E
        self.weight_S = _weights(load_E, expert_S)
        self.load_D = np.bincount(device_S, weights=self.weight_S, minlength=devices)

    @property
    def highest(self) -> float:
        """Load of the most loaded device."""
        return float(self.load_D.max())

    def swap(self) -> None:
        """Exchange a replica of the most loaded device for another's, the best first, until none lowers its load."""
        while True:
            top = int(self.load_D.argmax())
            own, other = np.flatnonzero(self.device_S == top), np.flatnonzero(self.device_S != top)
            if not len(other):
                return
            moved_OS = self.weight_S[own, None] - self.weight_S[None, other]
            higher_OS = np.maximum(self.load_D[top] - moved_OS, self.load_D[self.device_S[other]] + moved_OS)
            best = int(higher_OS.argmin())
            if higher_OS.flat[best] >= self.load_D[top] * (1 - _LEAST_GAIN):
                return
            a, b = own[best // len(other)], other[best % len(other)]
            moved, device = self.weight_S[a] - self.weight_S[b], self.device_S[b]
            self.load_D[top] -= moved
            self.load_D[device] += moved
            self.device_S[a], self.device_S[b] = device, top

    def with_another_replica(self) -> "_Slots | None":
        """One slot given to another expert, then swaps; None where that lowers no highest load."""
        num_experts = len(self._load_E)
        slots, higher_GE = self._replacements()
        for best in np.argsort(higher_GE, axis=None, kind="stable")[:_TRIED]:
            if np.isinf(higher_GE.flat[best]):
                return None
            expert_S = self.expert_S.copy()
            expert_S[slots[best // num_experts]] = best % num_experts
            changed = _Slots(expert_S, self.device_S.copy(), self._load_E, len(self.load_D))
            changed.swap()
            if changed.highest < self.highest * (1 - _LEAST_GAIN):
                return changed
        return None

    def _replacements(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The G slots that can be given away, and the highest load when an expert takes one -> [G, E]."""
        devices, load_E = np.eye(len(self.load_D)), self._load_E
        count_ED = np.zeros((len(load_E), len(self.load_D)))
        np.add.at(count_ED, (self.expert_S, self.device_S), 1)
        replicas_E = count_ED.sum(axis=1)
        slots = np.flatnonzero(replicas_E[self.expert_S] > 1)
        giver_G, here_GD = self.expert_S[slots], devices[self.device_S[slots]]
        # The replicas that a giver keeps bear more each, those that a taker has bear less.
        more_G, less_E = load_E[giver_G] / (replicas_E[giver_G] - 1), load_E / (replicas_E + 1)
        given_GD = (count_ED[giver_G] - here_GD) * more_G[:, None] - count_ED[giver_G] * self.weight_S[slots, None]
        taken_ED = count_ED * (less_E - load_E / replicas_E)[:, None]
        higher_GE = np.full((len(slots), len(load_E)), -np.inf)
        for device, load in enumerate(self.load_D):
            after_GE = load + given_GD[:, device, None] + taken_ED[:, device] + here_GD[:, device, None] * less_E
            np.maximum(higher_GE, after_GE, out=higher_GE)
        higher_GE[np.arange(len(slots)), giver_G] = np.inf
        return slots, higher_GE

    def placement(self) -> Placement:
        """The experts of each device."""
        return tuple(
            tuple(sorted(self.expert_S[self.device_S == device].tolist())) for device in range(len(self.load_D))
        )


def _replicas(load_E: Loads, devices: int, slots: int) -> npt.NDArray[np.int64]:
    """How many slots each expert gets: no more than there are devices."""
    replicas_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(slots - len(load_E)):
        each_E = np.where(replicas_E < devices, load_E / replicas_E, -1.0)
        replicas_E[each_E.argmax()] += 1
    return replicas_E


def _longest_first(load_E: Loads, expert_S: npt.NDArray[np.int64], devices: int) -> npt.NDArray[np.int64]:
    """The device of each slot -> [S]."""
    weight_S = _weights(load_E, expert_S).tolist()
    room, loads = [len(expert_S) // devices] * devices, [0.0] * devices
    held: list[set[int]] = [set() for _ in range(devices)]
    device_S = np.zeros(len(expert_S), dtype=np.int64)
    for slot in sorted(range(len(expert_S)), key=lambda slot: -weight_S[slot]):
        expert = int(expert_S[slot])
        free = (device for device in range(devices) if room[device])
        device = min(free, key=lambda device: (loads[device], expert in held[device], device))
        device_S[slot] = device
        room[device] -= 1
        loads[device] += weight_S[slot]
        held[device].add(expert)
    return device_S


def _padded_round_robin(load_E: Loads, devices: int, slots: int) -> _Slots:
    """Round robin, each device's spare slots filled with its own heaviest expert, so that no device bears more."""
    heaviest = int(np.argmax(load_E))
    expert_S, device_S = [], []
    for device, experts in enumerate(round_robin_placement(len(load_E), devices)):
        # A device without experts takes a part of the heaviest, which is less than all of it.
        own = max(experts, key=lambda expert: load_E[expert], default=heaviest)
        expert_S += [*experts, *[own] * (slots // devices - len(experts))]
        device_S += [device] * (slots // devices)
    return _Slots(np.array(expert_S), np.array(device_S), load_E, devices)


def _weights(load_E: Loads, expert_S: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The load of each slot: its expert's, split over the slots that hold it."""
    return load_E[expert_S] / np.bincount(expert_S, minlength=len(load_E))[expert_S]
