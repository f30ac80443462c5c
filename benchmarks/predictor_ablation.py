"""What a predictor would have gained in the next iteration, by how it is fitted: from stored router evolution alone.

    python benchmarks/predictor_ablation.py ROOT RUN...

Takes runs that replayed without a predictor and recorded evolution (`--method r3 --set evolution.record=true`), so that
nothing predicted is in the data. Each fit is judged on the iteration after it, by every factor for all layers, and
under the rule by which a run chooses factors by layer (`predictor.judged_on = "next_iteration"`), from pooled evidence
(`chosen`) and from that of the newest iteration alone. Gains are over the zero predictor, means over runs and
iterations ± standard errors of those.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from statistics import mean, stdev
from typing import NamedTuple

import torch

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.evolution import EvolutionArchive
from moe_replay.routing.evidence import LayerEvidence
from moe_replay.routing.fitting import Objective, RouterDrift, Weighted, fit_layer
from moe_replay.routing.judging import judge_layer
from moe_replay.sections import PredictorConfig

SETTINGS = PredictorConfig()
FACTORS = SETTINGS.shrinkage
CHOSEN, BY_NEWEST = 0.0, -1.0
"""Stand for the factors that the rule chooses."""


class Way(NamedTuple):
    """One way to fit."""

    objective: Objective
    delay: int = 0
    """Iterations by which the fit is staler than it has to be."""
    window: int = 1


WAYS = {
    "ridge": Way(Objective("ridge", SETTINGS.ridge)),
    "ridge, λ = 0.01": Way(Objective("ridge", 0.01)),
    "ridge, λ = 1": Way(Objective("ridge", 1.0)),
    "ridge, one iteration staler": Way(Objective("ridge", SETTINGS.ridge), delay=1),
    "ridge, window of 3": Way(Objective("ridge", SETTINGS.ridge), window=3),
    "post-routing KL, L-BFGS": Way(Objective("post_routing_kl", SETTINGS.ridge, "lbfgs", SETTINGS.steps)),
    "post-routing KL, Adam": Way(Objective("post_routing_kl", SETTINGS.ridge, "adam", SETTINGS.steps)),
    "delta KL, L-BFGS": Way(Objective("delta_kl", SETTINGS.ridge, "lbfgs", SETTINGS.steps)),
}


class Gain(NamedTuple):
    """One iteration, all layers: points of agreement gained, KL over that of zero, layers in use."""

    agreement: float
    kl_ratio: float
    layers: int


def main(root: str, run_ids: list[str]) -> None:
    """Print a table of the ways by factors."""
    gains: dict[tuple[str, float], list[Gain]] = defaultdict(list)
    for run_id in run_ids:
        drifts, top_k = _read(RunStore(root, run_id))
        for name, way in WAYS.items():
            for factor, gain in _gains(drifts, top_k, way):
                gains[name, factor].append(gain)
            print(f"{run_id}: {name}", file=sys.stderr)
    iterations = len(gains["ridge", CHOSEN])
    print(f"{len(run_ids)} runs, {iterations} iterations; points of agreement gained, KL over the zero predictor's")
    headings = [*(f"all by {factor:g}" for factor in FACTORS), "by newest alone", "chosen"]
    print("fit".ljust(28) + "".join(heading.rjust(21) for heading in headings) + "layers".rjust(8))
    for name in WAYS:
        cells = [_cell(gains[name, factor]).rjust(21) for factor in (*FACTORS, BY_NEWEST, CHOSEN)]
        layers = mean(gain.layers for gain in gains[name, CHOSEN])
        print(name.ljust(28) + "".join(cells) + f"{layers:.1f}".rjust(8))


def _read(store: RunStore) -> tuple[dict[int, list[RouterDrift]], int]:
    """By iteration and layer what the routers did, and K."""
    drifts, top_k = {}, 1
    for iteration in store.iterations():
        training = store.committed("training", iteration)
        assert training is not None
        archive = EvolutionArchive.open(training)
        top_k = archive.provenance.origin.top_k
        group_S = torch.from_numpy(archive.group_S)
        layers = [archive.read_layer(position) for position in range(len(archive.layers))]
        drifts[iteration] = [RouterDrift(*(torch.from_numpy(part) for part in layer), group_S) for layer in layers]
    return drifts, top_k


def _gains(drifts: dict[int, list[RouterDrift]], top_k: int, way: Way) -> Iterator[tuple[float, Gain]]:
    """By factor, what each iteration's fit gained in the iteration that it would have served."""
    before: list[LayerEvidence] = []
    pooled: list[LayerEvidence] = []
    for iteration in sorted(drifts):
        newest = iteration - 1 - way.delay
        window = [n for n in range(newest, newest - way.window, -1) if n in drifts]
        if len(window) < way.window:
            continue
        evidence = []
        for position, target in enumerate(drifts[iteration]):
            parts = [Weighted(drifts[n][position], SETTINGS.forgetting ** (newest - n)) for n in window]
            evidence.append(judge_layer(fit_layer(parts, way.objective), target, FACTORS, top_k))
        if before:
            yield from ((factor, _gain(evidence, [factor] * len(evidence))) for factor in FACTORS)
            yield BY_NEWEST, _gain(evidence, [layer.choice(SETTINGS.evidence) for layer in before])
            yield CHOSEN, _gain(evidence, [layer.choice(SETTINGS.evidence) for layer in pooled])
        before = evidence
        together = zip(evidence, pooled, strict=True)
        pooled = [new.after(old, SETTINGS.memory) for new, old in together] if pooled else evidence


def _gain(evidence: list[LayerEvidence], factors: list[float]) -> Gain:
    agreement, kl, zero = [], [], []
    for layer, factor in zip(evidence, factors, strict=True):
        found = next((one for one in layer.factors if one.factor == factor), None)
        agreement.append(found.agreement_change if found else 0.0)
        kl.append(found.kl if found else layer.kl_zero)
        zero.append(layer.kl_zero)
    return Gain(100 * mean(agreement), sum(kl) / sum(zero), sum(factor > 0 for factor in factors))


def _cell(gains: list[Gain]) -> str:
    agreement, ratios = [gain.agreement for gain in gains], [gain.kl_ratio for gain in gains]
    return f"{mean(agreement):+.3f}±{stdev(agreement) / len(agreement) ** 0.5:.3f} {mean(ratios):.3f}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
