"""Predictors of all layers from opened router evolution: fit, judge, shrink. Knows no run, writes nothing.

One layer is in memory at a time. Shapes: S tokens, H hidden size, E experts.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_replay.archive.artifacts import Artifact
from moe_replay.archive.commits import canonical_json
from moe_replay.archive.evolution import EvolutionArchive, has_evolution
from moe_replay.archive.layout import PREDICTOR_FILE
from moe_replay.errors import RoutingMismatch
from moe_replay.reports.predictor_report import REPORT_FILE, LayerReport, PredictorReport
from moe_replay.routing.evidence import LayerEvidence
from moe_replay.routing.fitting import Objective, RouterDrift, Weighted, fit_layer
from moe_replay.routing.judging import judge_layer
from moe_replay.routing.predictor import EvolutionPredictor, EvolutionSource, PredictorProvenance
from moe_replay.sections import PredictorConfig

FITTED_FILE = "fitted.safetensors"
"""The unshrunk fit of all layers, by which the next iteration judges shrinkage."""


class Predictors(NamedTuple):
    """What a fit leaves to the next iteration."""

    used: EvolutionPredictor
    """Shrunk, and only of layers in which it pays: what the next rollout is served with."""
    fitted: EvolutionPredictor
    """Of all layers, as fitted."""
    evidence: Mapping[int, LayerEvidence]
    """What was known of each decoder layer when it was chosen."""


class PredictorFit(NamedTuple):
    """A fit, and what it was chosen by."""

    predictors: Predictors
    report: PredictorReport

    def objects(self) -> dict[str, bytes]:
        """The files of a predictor artifact by name; equal fits give equal bytes."""
        return {
            PREDICTOR_FILE: self.predictors.used.to_bytes(),
            FITTED_FILE: self.predictors.fitted.to_bytes(),
            REPORT_FILE: canonical_json(self.report.model_dump(mode="json")),
        }


class Window(NamedTuple):
    """The router evolution to fit."""

    archives: tuple[EvolutionArchive, ...]
    """Newest first."""
    removed: int
    """Trainings whose evolution retention removed."""

    @classmethod
    def of(cls, trainings: Sequence[Artifact], lineage: Collection[str] = ()) -> "Window":
        """Open the evolution of some trainings, newest first; only the newest has to have kept it.

        The others are of the same run, or of `lineage`, the runs it was forked from. Raises ConfigError when retention
        removed the newest's, ArchiveCorrupt when one is damaged, RoutingMismatch when they don't descend or are of
        other runs or models.
        """
        kept = [training for training in trainings[1:] if has_evolution(training)]
        archives = tuple(EvolutionArchive.open(training) for training in (trainings[0], *kept))
        for newer, older in pairwise(archives):
            _require_follows(newer, older, lineage)
        return cls(archives, len(trainings) - len(archives))

    @property
    def newest(self) -> EvolutionArchive:
        """The evolution of the iteration that is fitted for."""
        return self.archives[0]


class _FittedLayer(NamedTuple):
    weight_EH: Tensor
    report: LayerReport


def fit_predictors(
    window: Window, settings: PredictorConfig, previous: Predictors | None, is_first: bool
) -> PredictorFit:
    """Fit, judge and shrink the predictor of each layer.

    Args:
        window: what is fitted; the newest is also what `previous` is judged on.
        settings: how.
        previous: what the iteration before left, None where there was none or it is gone. Without it no layer is used
            when judging on the next iteration.
        is_first: whether there was none, so that the newest iteration was served without a predictor.

    Raises:
        RoutingMismatch: `previous` is of another model.
        ArchiveCorrupt: evolution is damaged.
    """
    origin, run_id, iteration = window.newest.provenance.origin, *_place(window.newest)
    for predictor in (previous.used, previous.fitted) if previous else ():
        predictor.require_model(origin.num_experts, origin.hidden_size, origin.layers)
    held_out = [_held_out(archive, settings.held_out) for archive in window.archives]
    fitted = [
        _fit_layer(position, window, settings, previous, is_first, held_out) for position in range(len(origin.layers))
    ]
    refs = [archive.artifact.ref for archive in window.archives]
    provenance = PredictorProvenance(
        run_id=run_id,
        iteration=iteration,
        layers=origin.layers,
        num_experts=origin.num_experts,
        hidden_size=origin.hidden_size,
        evolution=tuple(EvolutionSource(uri=ref.uri, sha256=ref.sha256) for ref in refs),
        objective=settings.objective,
    )
    report = PredictorReport(
        run_id=run_id,
        iteration=iteration,
        objective=settings.objective,
        judged_on=settings.judged_on,
        memory=settings.memory,
        evidence=settings.evidence,
        top_k=origin.top_k,
        fitted_iterations=tuple(archive.provenance.iteration for archive in window.archives),
        removed_iterations=window.removed,
        fitted_tokens=sum(archive.num_tokens for archive in window.archives),
        layers=tuple(layer.report for layer in fitted),
    )
    used = {one.report.layer: one.weight_EH * one.report.factor for one in fitted if one.report.factor}
    whole = {one.report.layer: one.weight_EH for one in fitted}
    evidence = {layer.layer: layer.judged for layer in report.layers}
    kept = Predictors(EvolutionPredictor(used, provenance), EvolutionPredictor(whole, provenance), evidence)
    return PredictorFit(kept, report)


def _fit_layer(
    position: int,
    window: Window,
    settings: PredictorConfig,
    previous: Predictors | None,
    is_first: bool,
    held_out: Sequence[Tensor],
) -> _FittedLayer:
    origin, (_, iteration) = window.newest.provenance.origin, _place(window.newest)
    layer, top_k = origin.layers[position], origin.top_k
    parts = [_weighted(archive, position, iteration, settings.forgetting) for archive in window.archives]
    newest, objective = parts[0].drift, _objective(settings)
    if settings.judged_on == "held_out":
        rest = [Weighted(drift.where(~out_S), w) for (drift, w), out_S in zip(parts, held_out, strict=True)]
        # Of the newest iteration alone: the evidence of the others is pooled in already.
        seen = judge_layer(fit_layer(rest, objective), newest.where(held_out[0]), settings.shrinkage, top_k)
    else:
        unshrunk_EH = previous.fitted.weights.get(layer) if previous else None
        seen = judge_layer(unshrunk_EH, newest, settings.shrinkage, top_k)
    judged = seen.after(previous.evidence[layer], settings.memory) if previous else seen
    factor = judged.choice(settings.evidence)
    weight_EH = fit_layer(parts, objective)
    report = LayerReport(
        layer=layer,
        served=judge_layer(_served(previous, layer, is_first, weight_EH), newest, (1.0,), top_k),
        newest=seen,
        judged=judged,
        factor=factor,
        mean_bias=(newest.hidden_SH @ weight_EH.T).abs().double().mean().item() * factor,
        mean_logit=newest.old_SE.abs().double().mean().item(),
    )
    return _FittedLayer(weight_EH, report)


def _served(previous: Predictors | None, layer: int, is_first: bool, like_EH: Tensor) -> Tensor | None:
    """What this iteration's rollout added to the layer's gate; None where that is not known any more."""
    if previous is None:
        return torch.zeros_like(like_EH) if is_first else None
    return previous.used.weights.get(layer, torch.zeros_like(like_EH))


def _weighted(archive: EvolutionArchive, position: int, newest: int, forgetting: float) -> Weighted:
    """One layer of one iteration, and how much each of its tokens counts."""
    evolution, (_, iteration) = archive.read_layer(position), _place(archive)
    # The same number is another prompt in another iteration.
    hidden_SH, old_SE, new_SE = (torch.from_numpy(part) for part in evolution)
    group_S = torch.from_numpy(archive.group_S) + (iteration << 32)
    return Weighted(RouterDrift(hidden_SH, old_SE, new_SE, group_S), forgetting ** (newest - iteration))


def _held_out(archive: EvolutionArchive, share: float) -> Tensor:
    """Which tokens are of prompts left out: this share of them, drawn by a hash. -> [S] bool."""
    groups = sorted(set(archive.group_S.tolist()), key=lambda group: _hash(archive.provenance.iteration, group))
    # One at least on either side; a single prompt is left out, which leaves nothing to fit and nothing to use.
    number = max(min(round(share * len(groups)), len(groups) - 1), 1)
    chosen: npt.NDArray[np.bool_] = np.isin(archive.group_S, groups[:number])
    return torch.from_numpy(chosen)


def _hash(iteration: int, group: int) -> bytes:
    return hashlib.blake2b(f"{iteration}/{group}".encode(), digest_size=8).digest()


def _objective(settings: PredictorConfig) -> Objective:
    return Objective(settings.objective, settings.ridge, settings.optimizer, settings.steps)


def _place(archive: EvolutionArchive) -> tuple[str, int]:
    return archive.provenance.run_id, archive.provenance.iteration


def _require_follows(newer: EvolutionArchive, older: EvolutionArchive, lineage: Collection[str]) -> None:
    (run_a, a), (run_b, b) = _place(newer), _place(older)
    if _model(newer) != _model(older) or run_b not in {run_a, *lineage}:
        raise RoutingMismatch(
            f"evolution of run {run_b}, iteration {b}, is of a model with (experts, top_k, hidden size, MoE layers) = "
            f"{_model(older)}, that of run {run_a}, iteration {a}, of {_model(newer)}; fit evolution of one run"
        )
    if b >= a:
        raise RoutingMismatch(
            f"evolution of iteration {b} follows that of iteration {a}; give each iteration once, the newest first"
        )


def _model(archive: EvolutionArchive) -> tuple[int, int, int, tuple[int, ...]]:
    origin = archive.provenance.origin
    return origin.num_experts, origin.top_k, origin.hidden_size, origin.layers
