"""Scaled dot-product attention for ranks that share sequences, where there is no flash attention: on CPUs.

verl shares sequences out (DeepSpeed-Ulysses, arXiv 2309.14509) by exchanging tokens for heads around flash attention
alone. This does the same around torch's own attention, as an attention implementation of transformers.

Shapes: R rows of this rank, T rows of all ranks that share sequences, A heads of attention, D their size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from verl.utils import ulysses

from moe_replay.engines.packable import WHOLE_ATTENTION
from moe_replay.errors import ConfigError

NAME = "moe_replay_ulysses_sdpa"
"""What the model's `attn_implementation` is called."""
_WITHOUT_EFFECT = {
    *("use_cache", "cache_position", "past_key_values", "logits_to_keep", "num_items_in_batch", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
"""What families pass on to attention that changes nothing of it (`TransformersKwargs`, and what `forward` is given)."""


def ulysses_sdpa(
    module: nn.Module,
    query_1ARD: Tensor,
    key_1ARD: Tensor,
    value_1ARD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Causal attention within the sequences of a packed micro-batch; position_ids int64 [1, R] start each from 0.

    Returns [1, R, A, D]. Raises ConfigError for whatever else a family asks of attention: windows, chunks, sinks, soft
    caps, masks of its own, attention that is not causal or is not told the positions.
    """
    asked |= {"attention_mask": attention_mask, "is_causal": False if is_causal is False else None}
    _require_plain(module, asked)
    if position_ids is None:
        raise _beyond("does not tell attention position_ids, by which sequences are kept apart")
    # Fewer heads of keys than ranks are repeated, so that each rank has one.
    repeats = max(ulysses.get_ulysses_sequence_parallel_world_size() // key_1ARD.size(1), 1)
    parts = (query_1ARD, *(part.repeat_interleave(repeats, dim=1) for part in (key_1ARD, value_1ARD)))
    query, key, value = (ulysses.gather_seq_scatter_heads(part, seq_dim=2, head_dim=1) for part in parts)
    allowed = _causal_within_sequences(position_ids)
    attended = scaled_dot_product_attention(query, key, value, allowed, dropout, scale=scaling, enable_gqa=True)
    return ulysses.gather_heads_scatter_seq(attended.transpose(1, 2), head_dim=2, seq_dim=1), None


def _require_plain(module: nn.Module, asked: dict[str, Any]) -> None:
    """Refuse what would be left out: keywords of which it is not known that they change nothing, and masked layers."""
    unknown = sorted(name for name, value in asked.items() if value is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        told = ", ".join(f"{name} = {_short(asked[name])}" for name in unknown)
        raise _beyond(f"asks more of attention ({told})")
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and kinds[layer] not in WHOLE_ATTENTION:
        raise _beyond(f"has {kinds[layer]} in decoder layer {layer}")


def _beyond(what: str) -> ConfigError:
    return ConfigError(
        f"ranks that share sequences attend, without flash attention, to all of a sequence before a token and nothing "
        f"else, and this model {what}; set training.attention = 'flash_attention_2' or "
        "resources.training_sequence_parallel_size = 1"
    )


def _short(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _causal_within_sequences(position_ids: Tensor) -> Tensor:
    """bool [1, 1, T, T]: the tokens that each token attends to."""
    group = ulysses.get_ulysses_sequence_parallel_group()
    parts = [torch.empty_like(position_ids) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, position_ids.contiguous(), group=group)
    sequence_T = (torch.cat(parts, dim=-1)[0] == 0).cumsum(0)
    return (sequence_T[:, None] == sequence_T).tril()[None, None]


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers would make one of the rows of this rank."""


AttentionInterface.register(NAME, ulysses_sdpa)
AttentionMaskInterface.register(NAME, _no_mask)
