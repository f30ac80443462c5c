"""What replaying other routes would have meant for the very tokens of one rollout: the document and its figure."""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moe_replay.drawing import dress, layer_ticks, new_figure, percent_ticks, plain, save_figure, styles_of


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoutesTried(_Record):
    """One way to choose the replayed experts, held against the policy before the update and the one after it."""

    kl_k3: float | None
    """Of the rollout's policy to the trainer's before the update, under these routes.

    It holds staleness, and so does the next, where the rollout is one step off or carried over. None where the method
    would have sampled from another policy: a rollout under predicted gates is not one without, so neither can stand for
    the other.
    """
    extreme_fraction: float | None
    """Share of response tokens whose ratio of these two passes 2; None where `kl_k3` is."""
    agreement_L: tuple[float, ...]
    """Share of the K experts that the routers of the policy after the update would choose themselves, by layer."""
    coverage_gap_L: tuple[float, ...]
    """What the gates after the update give to other experts, by layer; empty where the model's routers don't tell."""
    forced_kl_k3: float
    """Of the policy after the update as it routes itself to the same policy under these routes.

    Estimated on the rollout's tokens. These were sampled before the update, from neither of the two, so it compares
    methods on the same tokens and is no unbiased estimate.
    """

    @property
    def agreement(self) -> float:
        """Mean over layers."""
        return sum(self.agreement_L) / len(self.agreement_L)

    @property
    def coverage_gap(self) -> float:
        """Mean over layers; NaN where it is not known."""
        return sum(self.coverage_gap_L) / len(self.coverage_gap_L) if self.coverage_gap_L else math.nan


class Counterfactual(_Record):
    """Several ways on one rollout, by method label."""

    run_id: str
    iteration: int
    """Whose rollout was taken."""
    checkpoint: int
    """The iteration whose training made the policy after the update."""
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer."""
    layers_predicted: int | None
    """How many layers of the trainer were steered by a predictor; None when it predicted nothing here."""
    methods: dict[str, RoutesTried]


def draw_counterfactual(found: Counterfactual, path: Path) -> None:
    """Agreement and coverage gap by layer, a line a method, to a PNG file; raises ConfigError as `save_figure` does."""
    figure = new_figure(9.6, 3.8)
    agreement, gap = figure.subplots(1, 2)
    dress(agreement, "agreement with the updated routers", "decoder layer")
    dress(gap, "what the updated gates give to other experts", "decoder layer")
    for method, style in styles_of(list(found.methods)).items():
        tried = found.methods[method]
        for axes, values_L in ((agreement, tried.agreement_L), (gap, tried.coverage_gap_L)):
            look = {"color": style.colour, "marker": style.marker, "linestyle": style.dashes, "label": plain(method)}
            axes.plot(range(len(values_L)), values_L, markersize=5, linewidth=1.4, **look)
    for axes in (agreement, gap):
        layer_ticks(axes.xaxis, found.layers)
        percent_ticks(axes)
    agreement.legend(frameon=False, fontsize=9)
    title = f"{plain(found.run_id)}: routes of iteration {found.iteration}, policy after iteration {found.checkpoint}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    save_figure(figure, path)
