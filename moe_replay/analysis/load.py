"""The load of experts, and what another placement of them would bring, from a routing archive.

With experts spread over devices, a layer takes as long as its most loaded device. Replayed routes are known before
training, so an expert plan can be made for the very micro-batch that it serves (ReLibra, arXiv 2605.08639); without
them a plan is made from the past. What it costs to move experts is not counted.

Legend: M micro-batches, L MoE layers, E experts, K experts per token, D devices, T tokens.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from moe_replay.analysis.placement import (
    ExpertPlan,
    Placement,
    check_slots,
    linear_placement,
    plan_experts,
    plan_layer,
    round_robin_placement,
    shares_of,
)
from moe_replay.archive.routes import RouteArchive
from moe_replay.errors import ConfigError

PlacementName = Literal["linear", "round_robin", "previous", "static", "micro_batch"]
"""How experts are placed: as expert parallelism does by default, expert e on device e mod D, by a plan from the loads
of the iteration before, by one from the loads of this iteration, or by one for each micro-batch of its own loads."""

Loads = npt.NDArray[np.int64]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlacementImbalance(_Record):
    """What one placement makes of the loads; 1 is perfect balance, D is all load on one device."""

    placement: PlacementName
    slots: int
    """Of all devices together, in one layer; more than there are experts where hot ones are replicated."""
    imbalance: float
    """Highest load of a device over the mean of devices, averaged over micro-batches and layers."""
    imbalance_L: tuple[float, ...]
    """The same of each layer."""
    worst: float
    """The highest of any micro-batch and layer."""


class LoadStudy(_Record):
    """Expert load of one iteration's routes, and the imbalance under each placement."""

    run_id: str
    iteration: int
    previous_iteration: int | None
    """Whose loads the placement `previous` is planned from; None where there is none."""
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer."""
    num_experts: int
    top_k: int
    tokens: int
    """With captured routes; all others load no expert here."""
    micro_batch_tokens: int
    micro_batches: int
    devices: int
    slots: int
    load_LE: tuple[tuple[int, ...], ...]
    """Tokens that each expert serves in the iteration."""
    expert_imbalance_L: tuple[float, ...]
    """Most loaded expert over the mean expert."""
    placements: tuple[PlacementImbalance, ...]
    plan: ExpertPlan
    """The placement `static` in `slots` slots."""

    def imbalance_of(self, placement: PlacementName, slots: int | None = None) -> float | None:
        """Of a placement in so many slots, by default in the most there are of it; None where it was not studied."""
        found = [p for p in self.placements if p.placement == placement and slots in (None, p.slots)]
        return found[-1].imbalance if found else None


def study_loads(
    archive: RouteArchive,
    devices: int,
    slots: int | None = None,
    micro_batch_tokens: int = 8192,
    previous: RouteArchive | None = None,
) -> LoadStudy:
    """Study the loads of one iteration, holding one chunk of routes and 8 L E bytes for each micro-batch.

    Args:
        archive: the iteration's routes.
        devices: D, over which the experts of each layer are spread.
        slots: experts that all devices together hold in one layer; by default E. With more, planned placements are
            studied with E slots too, where the devices share them evenly.
        micro_batch_tokens: most tokens that go through the experts together.
        previous: routes of an iteration before, of the same model.

    Raises:
        ConfigError: the devices can't share the slots evenly, or no route was captured.
        RoutingMismatch: `previous` is of another model.
        ArchiveCorrupt: what is read is not as committed.
    """
    provenance = archive.provenance
    num_experts = provenance.num_experts
    slots = num_experts if slots is None else slots
    check_slots(num_experts, devices, slots)
    load_MLE = read_loads(archive, micro_batch_tokens)
    load_LE = load_MLE.sum(axis=0)
    if not load_LE.any():
        raise ConfigError(
            f"none of the {archive.num_tokens} tokens of {archive.artifact.name} has a captured route, so there is no "
            "load to study; name an iteration whose rollout captured routes"
        )
    earlier_LE = None
    if previous is not None:
        previous.require_model(num_experts, provenance.top_k, archive.layers)
        earlier_LE = read_loads(previous, previous.num_tokens or 1).sum(axis=0)
    plan = plan_experts(load_LE, archive.layers, devices, slots)
    return LoadStudy(
        run_id=provenance.run_id,
        iteration=provenance.iteration,
        previous_iteration=None if previous is None else previous.provenance.iteration,
        layers=archive.layers,
        num_experts=num_experts,
        top_k=provenance.top_k,
        tokens=provenance.captured_rows,
        micro_batch_tokens=micro_batch_tokens,
        micro_batches=len(load_MLE),
        devices=devices,
        slots=slots,
        load_LE=tuple(tuple(row) for row in load_LE.tolist()),
        expert_imbalance_L=tuple((load_LE.max(axis=1) / load_LE.mean(axis=1)).tolist()),
        placements=tuple(_placements(load_MLE, earlier_LE, plan)),
        plan=plan,
    )


def read_loads(archive: RouteArchive, micro_batch_tokens: int) -> Loads:
    """Tokens that each expert serves -> [M, L, E], of micro-batches as `micro_batch_starts` has them.

    Reads a chunk of routes at a time; rows without a captured route load no expert.
    """
    starts = micro_batch_starts(archive, micro_batch_tokens)
    num_layers, num_experts = len(archive.layers), archive.provenance.num_experts
    load_MLE = np.zeros((len(starts), num_layers, num_experts), dtype=np.int64)
    for rows in archive.chunks():
        trace = archive.read(rows)
        batch_T = np.searchsorted(starts, np.arange(rows.start, rows.stop), side="right") - 1
        batch_V, ids_VLK = batch_T[trace.valid_T], trace.ids_TLK[trace.valid_T]
        first, last = int(batch_T[0]), int(batch_T[-1])
        for layer in range(num_layers):
            places = (batch_V - first)[:, None] * num_experts + ids_VLK[:, layer]
            counts = np.bincount(places.ravel(), minlength=(last - first + 1) * num_experts)
            load_MLE[first : last + 1, layer] += counts.reshape(-1, num_experts)
    return load_MLE


def micro_batch_starts(archive: RouteArchive, micro_batch_tokens: int) -> npt.NDArray[np.int64]:
    """First token of each micro-batch: consecutive sequences of at most so many tokens, or one that is longer.

    Raises ConfigError unless there is room for a token.
    """
    if micro_batch_tokens < 1:
        raise ConfigError(f"micro-batches of {micro_batch_tokens} tokens hold nothing; give at least 1 token")
    starts = []
    for tokens in archive.sequence_tokens(0, archive.num_sequences):
        if tokens.start < tokens.stop and (not starts or tokens.stop - starts[-1] > micro_batch_tokens):
            starts.append(tokens.start)
    return np.array(starts, dtype=np.int64)


def _placements(load_MLE: Loads, earlier_LE: Loads | None, plan: ExpertPlan) -> list[PlacementImbalance]:
    num_layers, num_experts = load_MLE.shape[1:]
    layers, devices = range(num_layers), plan.devices
    load_LE = load_MLE.sum(axis=0)
    alike: dict[PlacementName, Placement] = {
        "linear": linear_placement(num_experts, devices),
        "round_robin": round_robin_placement(num_experts, devices),
    }
    found = [
        _judged(name, num_experts, _imbalance(load_MLE, [placement] * num_layers)) for name, placement in alike.items()
    ]
    # Replication is told apart from placement: what is planned is studied without replicas too.
    for slots in sorted({plan.slots} | ({num_experts} if num_experts % devices == 0 else set())):
        if earlier_LE is not None:
            planned = [plan_layer(earlier_LE[layer], devices, slots) for layer in layers]
            found.append(_judged("previous", slots, _imbalance(load_MLE, planned)))
        planned = [plan_layer(load_LE[layer], devices, slots) for layer in layers]
        found.append(_judged("static", slots, _imbalance(load_MLE, planned)))
        each = [
            _imbalance(load_MLE[m : m + 1], [plan_layer(load_MLE[m, layer], devices, slots) for layer in layers])
            for m in range(len(load_MLE))
        ]
        found.append(_judged("micro_batch", slots, np.concatenate(each)))
    return found


def _imbalance(load_MLE: Loads, placements: list[Placement]) -> npt.NDArray[np.float64]:
    """Highest load of a device over the mean -> [M, L]; NaN where nothing was captured."""
    imbalance_ML = np.empty(load_MLE.shape[:2])
    for layer, placement in enumerate(placements):
        load_MD = load_MLE[:, layer] @ shares_of(placement, load_MLE.shape[2])
        mean_M = load_MD.mean(axis=1)
        imbalance_ML[:, layer] = load_MD.max(axis=1) / np.where(mean_M > 0, mean_M, np.nan)
    return imbalance_ML


def _judged(name: PlacementName, slots: int, imbalance_ML: npt.NDArray[np.float64]) -> PlacementImbalance:
    return PlacementImbalance(
        placement=name,
        slots=slots,
        imbalance=float(np.nanmean(imbalance_ML)),
        imbalance_L=tuple(np.nanmean(imbalance_ML, axis=0).tolist()),
        worst=float(np.nanmax(imbalance_ML)),
    )
