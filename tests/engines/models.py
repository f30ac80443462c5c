"""Tiny models on disk, and what transformers itself says of them: the reference of both engines."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_replay import tiny
from moe_replay.engines.rollout import Response
from moe_replay.routing.routers import Routers

_COMMON: dict[str, Any] = {
    "vocab_size": 99,  # two ranks have uneven shards of it
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_DENSE_FIRST = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8},
    "deepseek_v3": {
        **_DENSE_FIRST,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "glm4_moe": _DENSE_FIRST,
}


def write_random(folder: Path, family: str, **settings: Any) -> Path:
    """A random fp32 model with the embedded tokenizer and weights large enough that routes matter."""
    config = AutoConfig.for_model(family, **{**_COMMON, **_CONFIGS[family], **settings})
    model: Any = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def write_perturbed(model_folder: Path, folder: Path) -> Path:
    """The model with noise in each of its weights: other tokens, other log-probs, other routes."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0.1
    model.save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Reference:
    """What transformers computes for one sequence of T prompt and response tokens, S of them the response."""

    log_probs_S: np.ndarray
    ids_TLK: np.ndarray
    router_margin_TL: np.ndarray
    """Gap between the last chosen and the first rejected router logit: ties can fall either way."""


def reference(folder: Path, prompt_ids: list[int], response_ids: list[int], temperature: float) -> Reference:
    """Log-probs of the response and routes of all tokens under the model of `folder`."""
    model, routers = _load(folder)
    with torch.no_grad():
        output = model(torch.tensor([prompt_ids + response_ids]), output_router_logits=True)
    logits_SV = output.logits[0, len(prompt_ids) - 1 : -1] / temperature
    log_probs_SV = logits_SV.log_softmax(-1)
    ranked_LTE = torch.stack(output.router_logits).sort(-1, descending=True).values
    return Reference(
        log_probs_SV[torch.arange(len(response_ids)), torch.tensor(response_ids)].numpy(),
        routers.live_RLK.numpy(),
        (ranked_LTE[..., routers.top_k - 1] - ranked_LTE[..., routers.top_k]).T.numpy(),
    )


def greedy(folder: Path, prompt_ids: list[int], most: int) -> list[int]:
    """The likeliest token each time, up to the end of the sequence."""
    model, _ = _load(folder)
    output = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=most)
    return output[0, len(prompt_ids) :].tolist()


@cache
def _load(folder: Path) -> tuple[Any, Routers]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
    model.eval()
    return model, Routers(model)


def same_sets(one_TLK: np.ndarray, other_TLK: np.ndarray) -> np.ndarray:
    """Whether two routes name the same experts, in any order. -> bool [T, L]."""
    return (np.sort(one_TLK, axis=-1) == np.sort(other_TLK, axis=-1)).all(-1)


def assert_same(one: list[Response], other: list[Response]) -> None:
    """To the last bit, order of experts included."""
    for a, b in zip(one, other, strict=True):
        assert (a.prompt_ids, a.response_ids, a.text, a.truncated) == (
            b.prompt_ids,
            b.response_ids,
            b.text,
            b.truncated,
        )
        assert a.log_probs == b.log_probs
        np.testing.assert_array_equal(a.trace.ids_TLK, b.trace.ids_TLK)
