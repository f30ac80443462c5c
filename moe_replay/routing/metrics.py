"""What is measured of routes and policies, as pure functions of tensors (`docs/methods.md` defines each).

Shapes: T tokens, L MoE layers, E experts, K experts per token, N sequences, S response tokens of the longest.
"""

import torch
from torch import Tensor

from moe_replay.routing.statistics import EXTREME_RATIO

_MOST_DEVIATING = 3


def topk_agreement(one_TLK: Tensor, other_TLK: Tensor) -> Tensor:
    """Share of each token's K experts that both routes name, in any order. -> [T, L], 0..1.

    PR2, section 5.4 (arXiv 2606.00395).
    """
    hits_TLK = torch.zeros(one_TLK.shape, dtype=torch.bool, device=one_TLK.device)
    # By column: comparing all pairs at once would take K times the memory of the routes.
    for other_TL in other_TLK.unbind(-1):
        hits_TLK |= one_TLK == other_TL[..., None]
    return hits_TLK.float().mean(-1)


def deviation_by_layer(replayed_TLK: Tensor, live_TLK: Tensor) -> Tensor:
    """Share of each layer's tokens in which 0, 1, 2, or 3 and more of the K experts differ. -> float64 [L, 4].

    PR2's router deviation: the histogram over K minus the experts in common (arXiv 2606.00395).
    """
    top_k = replayed_TLK.shape[-1]
    missed_TL = ((1 - topk_agreement(replayed_TLK, live_TLK)) * top_k).round().to(torch.int64)
    bins_TLD = torch.nn.functional.one_hot(missed_TL.clamp_max(_MOST_DEVIATING), _MOST_DEVIATING + 1)
    return bins_TLD.double().mean(0)


def kl_estimates(sampled_NS: Tensor, other_NS: Tensor, mask_NS: Tensor) -> tuple[float, float]:
    """KL(sampled ‖ other) over tokens that were sampled, by the estimators k1 and k3. Log-probs in.

    k1 is the mean of -log r and k3 that of r - 1 - log r with r = other / sampled; in float64, since k3 of nearly equal
    log-probs is below float32's rounding of 1.
    """
    log_ratio_T = (other_NS - sampled_NS)[mask_NS].double()
    return -log_ratio_T.mean().item(), (log_ratio_T.expm1() - log_ratio_T).mean().item()


def extreme_fraction(train_NS: Tensor, rollout_NS: Tensor, mask_NS: Tensor) -> float:
    """Share of response tokens whose ratio of probabilities passes `EXTREME_RATIO` either way. Log-probs in."""
    distance_NS = (train_NS - rollout_NS).abs()
    extreme_NS = distance_NS > torch.tensor(EXTREME_RATIO).log()
    return (extreme_NS & mask_NS).sum().item() / max(int(mask_NS.sum()), 1)


def expert_load(ids_TLK: Tensor, num_experts: int) -> Tensor:
    """How many tokens each expert serves in each layer. -> int64 [L, E]."""
    loads = [
        torch.bincount(layer_TK.flatten().to(torch.int64), minlength=num_experts) for layer_TK in ids_TLK.unbind(1)
    ]
    return torch.stack(loads)


def load_imbalance(load_LE: Tensor) -> float:
    """Most loaded expert over the mean load of its layer, averaged over layers; 1 is perfect balance."""
    mean_L = load_LE.double().mean(-1)
    return (load_LE.amax(-1)[mean_L > 0] / mean_L[mean_L > 0]).mean().item() if mean_L.any() else 1.0


def policy_health(
    log_probs_NS: Tensor,
    old_NS: Tensor,
    advantages_NS: Tensor,
    mask_NS: Tensor,
    clip: tuple[float, float],
    whole_sequences: bool,
) -> dict[str, float]:
    """`policy/*`: `clip_low`, `clip_high`, share of tokens whose gradient the clip cuts; `ratio_max`; `kl_old` (k1).

    `whole_sequences` takes GSPO's ratio, the geometric mean over a sequence (arXiv 2507.18071).
    """
    log_ratio_NS = (log_probs_NS - old_NS) * mask_NS
    kl_old = -(log_ratio_NS.sum() / mask_NS.sum()).item()
    if whole_sequences:
        lengths_N = mask_NS.sum(-1, keepdim=True).clamp_min(1)
        log_ratio_NS = (log_ratio_NS.sum(-1, keepdim=True) / lengths_N).expand_as(log_ratio_NS)
    ratio_NS = log_ratio_NS.exp()
    low_NS = (ratio_NS < 1 - clip[0]) & (advantages_NS < 0) & mask_NS
    high_NS = (ratio_NS > 1 + clip[1]) & (advantages_NS > 0) & mask_NS
    tokens = mask_NS.sum()
    return {
        "policy/clip_low": (low_NS.sum() / tokens).item(),
        "policy/clip_high": (high_NS.sum() / tokens).item(),
        "policy/ratio_max": ratio_NS[mask_NS].max().item(),
        "policy/kl_old": kl_old,
    }
