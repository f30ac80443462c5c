"""Fitting one layer's evolution predictor W_p: what of a router's drift its old input foretells, linearly.

Of a token, h is what the router was given in the old log-prob pass, p_old = h W its logits then, and p_θ those it gave
the same token after the update (PR2, arXiv 2606.00395, calls the three router evolution). Three objectives:

    ridge             ½ ‖Δp - h W_p‖², Δp = p_θ - p_old less its mean over experts, which routes nothing; closed form
    post_routing_kl   KL(softmax(p_θ) ‖ softmax(p_old + h W_p)), PR2's choice
    delta_kl          KL(softmax(p_θ - p_old) ‖ softmax(h W_p)), its alternative

Each is averaged over tokens, those of an older iteration counting less, and gets the same penalty: ridge/2 · ‖W_p‖²
in units of the mean diagonal of the objective's Hessian at W_p = 0. For `ridge` that unit is the mean second moment of
h; for the divergences, whose curvature is softmax's besides, that moment times the mean of q (1 - q) over experts.

Shapes: S tokens, H hidden size, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

ADAM_LEARNING_RATE = 0.1
"""Of the first step; falls linearly to 0 over all. In units in which W_p's entries are about 1 (`_natural_scale`)."""

SMALLEST_GAIN = 1e-6
"""L-BFGS ends when a step gains less, as a share of the loss of the zero predictor; float32 tells little less apart."""


class RouterDrift(NamedTuple):
    """What one router did to some tokens of one iteration."""

    hidden_SH: Tensor
    """What it was given before the update, float32."""
    old_SE: Tensor
    """Its logits before the update, float32."""
    new_SE: Tensor
    """Its logits for the same tokens after it, float32."""
    group_S: Tensor
    """Prompt group of each token, int64."""

    def where(self, chosen_S: Tensor) -> "RouterDrift":
        """Only the tokens that a boolean mask chooses."""
        return RouterDrift(*(part[chosen_S] for part in self))

    @classmethod
    def joined(cls, drifts: Sequence["RouterDrift"]) -> "RouterDrift":
        """The tokens of all, one after the other."""
        return cls(*(torch.cat(parts) for parts in zip(*drifts, strict=True)))


class Weighted(NamedTuple):
    """Tokens of one iteration, and what each of them counts in a fit."""

    drift: RouterDrift
    weight: float


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how."""

    name: Literal["ridge", "post_routing_kl", "delta_kl"] = "ridge"
    ridge: float = 0.1
    """Weight of the penalty, in units of the mean diagonal of the Hessian."""
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    """What minimises a divergence."""
    steps: int = 100
    """Most steps of that optimizer."""


def fit_layer(parts: Sequence[Weighted], objective: Objective) -> Tensor:
    """W_p of one layer from its drift in some iterations. -> [E, H] float32.

    Zero where nothing can be learned: no drift, no input, or a minimisation that ends no better than it began.
    """
    return _ridge(parts, objective.ridge) if objective.name == "ridge" else _divergence(parts, objective)


def _ridge(parts: Sequence[Weighted], ridge: float) -> Tensor:
    """Solve (Σ w X'X + ridge · mean diagonal · I) W = Σ w X'Y, in float64: a small ridge leaves it ill-conditioned."""
    (_, hidden_size), (_, num_experts) = parts[0].drift.hidden_SH.shape, parts[0].drift.old_SE.shape
    moments_HH = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
    cross_HE = torch.zeros(hidden_size, num_experts, dtype=torch.float64)
    for drift, weight in parts:
        hidden_SH = drift.hidden_SH.double()
        moments_HH.addmm_(hidden_SH.T, hidden_SH, alpha=weight)
        cross_HE.addmm_(hidden_SH.T, _centred_drift(drift), alpha=weight)
    scale = moments_HH.diagonal().mean()
    if scale == 0:
        return torch.zeros(num_experts, hidden_size)
    moments_HH.diagonal().add_(ridge * scale)
    factor_HH, failed = torch.linalg.cholesky_ex(moments_HH)
    if failed:
        # A ridge too small to be seen beside the moments, of fewer tokens than dimensions: the shortest solution.
        solution_HE = torch.linalg.lstsq(moments_HH, cross_HE, driver="gelsd").solution
    else:
        solution_HE = torch.cholesky_solve(cross_HE, factor_HH)
    return solution_HE.T.float().contiguous()


def _divergence(parts: Sequence[Weighted], objective: Objective) -> Tensor:
    """Minimise a KL divergence from W_p = 0, as a share of what it is there: no drift is too small to be seen."""
    drift = RouterDrift.joined([part.drift for part in parts])
    weight_S = torch.cat([torch.full((len(part.drift.old_SE),), part.weight, dtype=torch.float64) for part in parts])
    weight_S /= weight_S.sum()
    old_SE, new_SE = drift.old_SE.double(), drift.new_SE.double()
    if objective.name == "delta_kl":
        old_SE, new_SE = torch.zeros_like(old_SE), new_SE - old_SE
    target_SE = log_softmax(new_SE, dim=-1)
    scale = _natural_scale(drift, weight_S)
    unit_EH = torch.zeros(old_SE.shape[1], drift.hidden_SH.shape[1], requires_grad=True)
    penalty = 0.5 * objective.ridge * _mean_curvature(drift.hidden_SH, old_SE, weight_S) * scale**2

    def loss() -> Tensor:
        predicted_SE = old_SE + (drift.hidden_SH @ unit_EH.T).double() * scale
        kl_S = kl_div(log_softmax(predicted_SE, dim=-1), target_SE, reduction="none", log_target=True).sum(-1)
        return weight_S @ kl_S + penalty * unit_EH.double().square().sum()

    with torch.no_grad():
        at_zero = loss()
    if scale == 0 or at_zero <= 0:
        return unit_EH.detach()
    _minimise(unit_EH, lambda: loss() / at_zero, objective)
    with torch.no_grad():
        # Written so that NaN counts as no better.
        if not loss() < at_zero:
            return torch.zeros_like(unit_EH)
        # What all experts get alike routes nothing; Adam's steps leave some of it.
        return (unit_EH - unit_EH.mean(0, keepdim=True)) * scale


def _minimise(parameter: Tensor, loss: Callable[[], Tensor], objective: Objective) -> None:
    if objective.optimizer == "lbfgs":
        optimizer = torch.optim.LBFGS(
            [parameter], max_iter=objective.steps, tolerance_change=SMALLEST_GAIN, line_search_fn="strong_wolfe"
        )
        rounds, decay = 1, None
    else:
        optimizer = torch.optim.Adam([parameter], lr=ADAM_LEARNING_RATE)
        rounds = objective.steps
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=rounds)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    for _ in range(rounds):
        optimizer.step(closure)
        if decay:
            decay.step()


def _centred_drift(drift: RouterDrift) -> Tensor:
    """Δp less its mean over experts, float64 [S, E]."""
    delta_SE = drift.new_SE.double() - drift.old_SE.double()
    return delta_SE - delta_SE.mean(-1, keepdim=True)


def _natural_scale(drift: RouterDrift, weight_S: Tensor) -> float:
    """Size of W_p's entries if h foretold all of the drift: rms(Δp) / (rms(h) √H); 0 where either is."""
    delta = (weight_S @ _centred_drift(drift).square()).mean()
    hidden = (weight_S @ drift.hidden_SH.double().square()).sum()
    return (delta / hidden).sqrt().item() if hidden > 0 else 0.0


def _mean_curvature(hidden_SH: Tensor, at_SE: Tensor, weight_S: Tensor) -> Tensor:
    """Mean diagonal of the Hessian in W_p of the mean KL to softmax(at + h W_p), at W_p = 0."""
    probabilities_SE = at_SE.softmax(-1)
    variance_S = (probabilities_SE * (1 - probabilities_SE)).mean(-1)
    return weight_S @ (variance_S * hidden_SH.double().square().mean(-1))
