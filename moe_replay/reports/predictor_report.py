"""What a fit of predictors found, layer by layer: the object `report.json` of a predictor artifact."""

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.routing.evidence import FactorEvidence, LayerEvidence

REPORT_FILE = "report.json"
"""Where it lies in a predictor artifact."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerReport(_Record):
    """One layer's predictor: the one that was served, the evidence on shrinkage, the one to serve next."""

    layer: int
    """Decoder layer index."""
    served: LayerEvidence
    """How the predictor that served this iteration's rollout did on this iteration's drift, as it was used (factor 1).

    Nothing was chosen or fitted on these tokens. No factors where retention removed that predictor.
    """
    newest: LayerEvidence
    """How the unshrunk fit that was judged in this iteration did, by factor; no factors where there was none."""
    judged: LayerEvidence
    """The same pooled with what earlier iterations showed: what the factor is chosen by."""
    factor: float
    """What the new fit was multiplied by; 0 for a layer that keeps zero."""
    mean_bias: float
    """Mean of |h W_p| of the new predictor as used, over this iteration's tokens and experts."""
    mean_logit: float
    """Mean of |p_old| over the same."""

    @property
    def bias_ratio(self) -> float:
        """Size of what is added to the logits against theirs."""
        return self.mean_bias / self.mean_logit if self.mean_logit else 0.0

    @property
    def shown(self) -> FactorEvidence | None:
        """The evidence on the factor that was chosen, or on the one of least KL where none was."""
        chosen = [one for one in self.judged.factors if one.factor == self.factor]
        return (chosen or sorted(self.judged.factors, key=lambda one: one.kl) or [None])[0]


class PredictorReport(_Record):
    """One fit of all layers."""

    run_id: str
    iteration: int
    """The newest iteration that was fitted."""
    objective: str
    judged_on: str
    """`next_iteration`: the previous iteration's fit was judged on this one; `held_out`: on prompts left out."""
    memory: float
    """Weight of an iteration's evidence against that of the one after it."""
    evidence: float
    """Standard errors by which a layer had to lower the KL of the zero predictor."""
    top_k: int
    fitted_iterations: tuple[int, ...]
    """Newest first."""
    removed_iterations: int
    """Iterations of the window that retention had removed."""
    fitted_tokens: int
    layers: tuple[LayerReport, ...]

    @property
    def layers_used(self) -> int:
        """Layers whose predictor is not zero."""
        return sum(layer.factor > 0 for layer in self.layers)

    @property
    def bias_ratio(self) -> float:
        """Mean |h W_p| over mean |p_old|, over all layers; 0 when nothing is used."""
        logits = sum(layer.mean_logit for layer in self.layers)
        return sum(layer.mean_bias for layer in self.layers) / logits if logits else 0.0

    def metrics(self) -> dict[str, float]:
        """What the iteration logs, under the keys of `docs/methods.md`; means over all layers.

        `predictor/kl` and `predictor/agreement` are left out where the predictor that was served is gone.
        """
        served = [layer.served for layer in self.layers]
        measured = {
            "predictor/kl_zero": _mean([one.kl_zero for one in served]),
            "predictor/agreement_zero": _mean([one.agreement_zero for one in served]),
            "predictor/layers_used": float(self.layers_used),
            "predictor/bias_ratio": self.bias_ratio,
        }
        if all(one.factors for one in served):
            measured["predictor/kl"] = _mean([one.factors[0].kl for one in served])
            measured["predictor/agreement"] = _mean([one.factors[0].agreement for one in served])
        return measured


def read_report(store: RunStore, iteration: int | None) -> PredictorReport:
    """The report of an iteration's predictors, by default the last that has some.

    Raises ConfigError where there is none or retention removed it, ArchiveCorrupt when it is damaged.
    """
    for candidate in store.iterations()[::-1] if iteration is None else [iteration]:
        artifact = store.committed("predictor", candidate)
        if artifact is not None:
            return report_of(artifact)
    which = f"iteration {iteration}" if iteration is not None else "any iteration"
    raise ConfigError(
        f"run {store.run_id} has no predictors of {which}: its method has none, or it did not get there; see "
        f"moe-replay status {store.run_id}, or fit some from stored evolution with moe-replay predictor fit"
    )


def report_of(artifact: Artifact) -> PredictorReport:
    """The report in a predictor artifact; raises as `read_report` does."""
    data, commit = artifact.read_bytes(REPORT_FILE), artifact.commit
    try:
        report = PredictorReport.model_validate_json(data)
    except ValidationError as error:
        raise ArchiveCorrupt(
            f"{artifact.name}/{REPORT_FILE} is no report of this format ({error.error_count()} problems); read it with "
            "the moe-replay that wrote it"
        ) from error
    if (report.run_id, report.iteration) != (commit.run_id, commit.iteration):
        raise ArchiveCorrupt(
            f"{artifact.name}/{REPORT_FILE} is of run {report.run_id}, iteration {report.iteration}, its commit of run "
            f"{commit.run_id}, iteration {commit.iteration}; restore it"
        )
    return report


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
