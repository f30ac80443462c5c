"""Measuring one layer's predictor on tokens it was not fitted on, against predicting nothing.

Shapes: S tokens, H hidden size, E experts, K experts per token, G prompt groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from moe_replay.routing.evidence import FactorEvidence, LayerEvidence
from moe_replay.routing.fitting import RouterDrift
from moe_replay.routing.metrics import topk_agreement


def judge_layer(weight_EH: Tensor | None, drift: RouterDrift, factors: Sequence[float], top_k: int) -> LayerEvidence:
    """How W_p times each factor does on these tokens; without a W_p only how far the router moved.

    The set of a token is the top-K of its logits, as PR2 has it (arXiv 2606.00395).
    """
    kl_zero_S, agreement_zero_S = _outcome(drift.old_SE, drift, top_k)
    judged: list[FactorEvidence] = []
    if weight_EH is not None:
        bias_SE = drift.hidden_SH @ weight_EH.T
        for factor in factors:
            kl_S, agreement_S = _outcome(drift.old_SE + factor * bias_SE, drift, top_k)
            kl_change_S, agreement_change_S = kl_S - kl_zero_S, agreement_S - agreement_zero_S
            judged.append(
                FactorEvidence(
                    factor=factor,
                    kl=kl_S.mean().item(),
                    kl_change=kl_change_S.mean().item(),
                    kl_change_error=clustered_error(kl_change_S, drift.group_S),
                    agreement=agreement_S.mean().item(),
                    agreement_change=agreement_change_S.mean().item(),
                    agreement_change_error=clustered_error(agreement_change_S, drift.group_S),
                )
            )
    return LayerEvidence(
        tokens=len(drift.group_S),
        groups=len(drift.group_S.unique()),
        kl_zero=kl_zero_S.mean().item(),
        agreement_zero=agreement_zero_S.mean().item(),
        factors=tuple(judged),
    )


def clustered_error(values_S: Tensor, group_S: Tensor) -> float | None:
    """Standard error of the mean of values that are alike within a group; none for fewer than two groups.

    √(G/(G-1) · Σ_g (Σ_{s in g} (v_s - mean))²) / S: the usual cluster-robust one.
    """
    groups, index_S = group_S.unique(return_inverse=True)
    if len(groups) < 2:
        return None
    sums_G = torch.bincount(index_S, weights=values_S.double() - values_S.double().mean())
    return (sums_G.square().sum() * len(groups) / (len(groups) - 1)).sqrt().item() / len(values_S)


def _outcome(predicted_SE: Tensor, drift: RouterDrift, top_k: int) -> tuple[Tensor, Tensor]:
    """KL to the predicted gate distribution, and the share of experts predicted, of each token; float64 [S]."""
    target_SE, predicted = log_softmax(drift.new_SE.double(), dim=-1), log_softmax(predicted_SE.double(), dim=-1)
    kl_S = kl_div(predicted, target_SE, reduction="none", log_target=True).sum(-1)
    chosen_SK, predicted_SK = drift.new_SE.topk(top_k).indices, predicted_SE.topk(top_k).indices
    return kl_S, topk_agreement(chosen_SK, predicted_SK).double()
