"""Attention of ranks that share sequences without flash attention: what it does of what families ask, and refuses."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import LAYERS, config_of
from torch import nn
from torch._C._distributed_c10d import HashStore
from transformers import AutoModelForCausalLM

from moe_replay.errors import ConfigError


@pytest.fixture(scope="module")
def attention() -> Iterator[Any]:
    """The module, in a process group of one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VERL_PLATFORM", "cpu")  # read when verl is imported
        from moe_replay.engines import ulysses_attention
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield ulysses_attention
    torch.distributed.destroy_process_group()


def ask(attention: Any, module: nn.Module | SimpleNamespace | None = None, **asked: Any) -> torch.Tensor:
    parts = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    given = {"attention_mask": None, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])} | asked
    return attention.ulysses_sdpa(module or nn.Module(), *parts, **given)[0]


def logits(family: str, implementation: str, **changes: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation=implementation).eval()
    with torch.no_grad():
        ids, positions = torch.arange(5, 14)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_families_of_whole_attention_are_attended_to_as_torch_does_it(attention: Any, family: str) -> None:
    torch.testing.assert_close(logits(family, attention.NAME), logits(family, "sdpa"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama4_text", {"attention_chunk_size": 4}, r"has chunked_attention in decoder layer 0"),
        ("mixtral", {"sliding_window": 4}, r"sliding_window = 4"),
        ("gemma2", {"layer_types": ["full_attention"] * LAYERS}, r"softcap = 50\.0"),
    ],
)
def test_what_families_ask_beyond_it_is_refused(attention: Any, family: str, changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told + r".*set training\.attention = 'flash_attention_2' or resources"):
        logits(family, attention.NAME, **changes)


def test_keywords_that_change_nothing_are_taken(attention: Any) -> None:
    plain = ask(attention)
    taken = ask(attention, use_cache=False, cache_position=torch.arange(6), output_attentions=False, is_causal=True)
    assert torch.equal(plain, taken)
    assert torch.equal(plain, ask(attention, sliding_window=None, s_aux=None, anything=None))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"s_aux": torch.ones(4)}, r"s_aux = a tensor of shape \[4\]"),  # sinks of gpt-oss
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"attention_mask = a tensor of shape \[1, 1, 6, 6\]"),
        ({"is_causal": False}, "is_causal = False"),
        ({"position_bias": torch.ones(6)}, "position_bias"),
        ({"position_ids": None}, "does not tell attention position_ids"),
    ],
    ids=str,
)
def test_a_keyword_of_unknown_effect_is_refused(attention: Any, asked: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ask(attention, **asked)


def test_a_layer_whose_kind_is_in_its_mask_alone_is_refused(attention: Any) -> None:
    kinds = ["full_attention", "chunked_attention"]
    whole, chunked = (SimpleNamespace(config=SimpleNamespace(layer_types=kinds), layer_idx=i) for i in range(2))
    assert torch.equal(ask(attention, whole), ask(attention))
    with pytest.raises(ConfigError, match=r"has chunked_attention in decoder layer 1"):
        ask(attention, chunked)
