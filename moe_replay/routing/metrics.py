"""What is measured of routes and policies, as pure functions of tensors (`docs/methods.md` defines each).

Shapes: T tokens, L MoE layers, E experts, K experts per token, N sequences, S response tokens of the longest.
"""

import torch
from torch import Tensor

EXTREME_RATIO = 2.0
"""τ of R3's F(τ): a token is extreme when π/μ or μ/π passes it (arXiv 2510.11370)."""
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


def agreement_metrics(replayed_TLK: Tensor, live_TLK: Tensor) -> dict[str, float]:
    """`agreement`, and `deviation_{0,1,2,3plus}`: share of (token, layer) by experts that differ.

    PR2's router deviation is the histogram over K minus the experts in common. Empty without tokens.
    """
    if replayed_TLK.numel() == 0:
        return {}
    top_k = replayed_TLK.shape[-1]
    agreement_TL = topk_agreement(replayed_TLK, live_TLK)
    missed_TL = ((1 - agreement_TL) * top_k).round().to(torch.int64).clamp_max(_MOST_DEVIATING)
    shares = torch.bincount(missed_TL.flatten(), minlength=_MOST_DEVIATING + 1) / missed_TL.numel()
    names = ["deviation_0", "deviation_1", "deviation_2", "deviation_3plus"]
    return {"agreement": agreement_TL.mean().item(), **dict(zip(names, shares.tolist(), strict=True))}


def router_mismatch_metrics(rollout_TLK: Tensor, trainer_TLK: Tensor) -> dict[str, float]:
    """How often trainer and inference engine choose different sets for the same token.

    `router_fraction` over (token, layer), `token_fraction` over tokens with at least one such layer,
    `routers_per_token` their mean number (R3, section 3, arXiv 2510.11370). Empty without tokens.
    """
    if rollout_TLK.numel() == 0:
        return {}
    differs_TL = topk_agreement(rollout_TLK, trainer_TLK) < 1
    return {
        "router_fraction": differs_TL.float().mean().item(),
        "token_fraction": differs_TL.any(-1).float().mean().item(),
        "routers_per_token": differs_TL.float().sum(-1).mean().item(),
    }


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
    """`clip_low`, `clip_high`: share of tokens whose gradient the clip cuts; `ratio_max`; `kl_old`, estimator k1.

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
        "clip_low": (low_NS.sum() / tokens).item(),
        "clip_high": (high_NS.sum() / tokens).item(),
        "ratio_max": ratio_NS[mask_NS].max().item(),
        "kl_old": kl_old,
    }
