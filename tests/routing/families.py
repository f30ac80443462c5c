"""Tiny random models of the Mixture-of-Experts families in transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS = 8
TOP_K = 2
LAYERS = 3
VOCABULARY = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": EXPERTS}
_LOCAL = {"num_local_experts": EXPERTS}
_ROUTED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1}
_DENSE_FIRST = {**_ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "mixtral": _LOCAL,
    "olmoe": _EXPERTS,
    "deepseek_v3": {**_LATENT_ATTENTION, **_DENSE_FIRST},
    "glm4_moe": _DENSE_FIRST,
    "gpt_oss": _LOCAL,
    # From here on: one of each way in which families name, nest or place their router.
    "afmoe": {**_EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": TOP_K, "moe_num_shared_experts": 1},
    "deepseek_v2": {**_LATENT_ATTENTION, **_DENSE_FIRST},
    "deepseek_v4": {**_ROUTED, "mlp_layer_types": ["hash_moe", "moe", "moe"], "hc_mult": 2},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": TOP_K,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "gemma4_text": {
        **_EXPERTS,
        "top_k_experts": TOP_K,
        "enable_moe_block": True,
        "layer_types": ["full_attention"] * LAYERS,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "granitemoe": _LOCAL,
    "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": TOP_K},
    "jamba": {
        **_EXPERTS,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "llama4_text": {**_LOCAL, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
    "longcat_flash": {
        **_LATENT_ATTENTION,
        "n_routed_experts": EXPERTS - 2,
        "zero_expert_num": 2,
        "moe_topk": TOP_K,
        "num_layers": LAYERS,
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 32,
    },
    "minimax": _LOCAL,
    "nemotron_h": {
        **_DENSE_FIRST,
        "layers_block_type": ["attention", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 32,
    },
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION},
    # Refused.
    "jetmoe": {**_LOCAL, "kv_channels": 8},
    "llama": {},
    "phimoe": _LOCAL,
    "qwen3": {},
}
_EVERY_LAYER = tuple(range(LAYERS))
CORE: dict[str, tuple[int, ...]] = {
    "qwen2_moe": _EVERY_LAYER,
    "qwen3_moe": _EVERY_LAYER,
    "mixtral": _EVERY_LAYER,
    "olmoe": _EVERY_LAYER,
    "deepseek_v3": (1, 2),
    "glm4_moe": (1, 2),
    "gpt_oss": _EVERY_LAYER,
}
_MORE: dict[str, tuple[int, ...]] = {
    "afmoe": (1, 2),
    "aria_text": _EVERY_LAYER,
    "deepseek_v2": (1, 2),
    "deepseek_v4": (1, 2),
    "ernie4_5_moe": (1, 2),
    "gemma4_text": _EVERY_LAYER,
    "granitemoe": _EVERY_LAYER,
    "hunyuan_v1_moe": _EVERY_LAYER,
    "jamba": (1,),
    "llama4_text": _EVERY_LAYER,
    "longcat_flash": _EVERY_LAYER,
    "minimax": _EVERY_LAYER,
    "nemotron_h": (1, 3),
    "qwen3_next": _EVERY_LAYER,
}
MOE_LAYERS = {**CORE, **_MORE}
"""Decoder layers with routers, by family that can be replayed; `CORE` are those tested most."""
# Families whose experts have one implementation only and take no choice.
_FIXED_EXPERTS = ("aria_text", "granitemoe", "jetmoe", "llama4_text", "longcat_flash", "llama", "qwen3")


def config_of(family: str, **overrides: Any) -> Any:
    """The tiny config of any family of transformers."""
    return AutoConfig.for_model(family, **{**_COMMON, **CONFIGS.get(family, {}), **overrides})


def build(family: str, **overrides: Any) -> Any:
    """A fp32 causal language model in training mode, with weights large enough that routes matter."""
    config = config_of(family, **overrides)
    choice = {} if family in _FIXED_EXPERTS else {"experts_implementation": "grouped_mm"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **choice)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def build_plain(family: str) -> Any:
    """A model whose routers choose by their logits alone: without groups of experts, and with zero selection biases."""
    grouped = "n_group" in CONFIGS[family]
    model = build(family, **({"n_group": 1, "topk_group": 1} if grouped else {}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data.zero_()
    return model


def inputs() -> dict[str, Tensor]:
    """Two sequences of 12 tokens, the second left-padded by 3: R = 24 rows."""
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[1, :3] = 0
    return {"input_ids": tokens_BS, "attention_mask": mask_BS}


ROWS = 24
