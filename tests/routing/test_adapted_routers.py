"""Routers of models whose other weights have LoRA adapters: every family, adapters on all that can have one.

Shapes: R rows, L MoE layers, K experts per token.
"""

from typing import Any

import pytest
import torch
from families import EXPERTS, MOE_LAYERS, TOP_K, build
from model_steps import everywhere, foreign_routes, forward, router_gradients, same_sets, step
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from moe_replay.engines.adapters import adapted_paths, merged_weights, train_routers
from moe_replay.lora import LoraConfig
from moe_replay.routing.routers import Routers

RANK = 4


def adapt(model: Any) -> Any:
    modules, parameters = adapted_paths(model, LoraConfig(rank=RANK))
    assert parameters
    config = PeftConfig(r=RANK, lora_alpha=8, target_modules=modules, target_parameters=parameters)
    adapted = get_peft_model(model, config)
    assert sum(".lora_A." in name for name in adapted.state_dict()) == len(modules + parameters)
    return adapted


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@pytest.mark.parametrize("family", MOE_LAYERS)
def test_every_family_replays_under_adapters_and_merges(family: str) -> None:
    plain = build(family)
    untouched = forward(plain).detach()
    adapted = adapt(plain)
    routers = Routers(adapted)
    assert (routers.num_experts, routers.top_k, routers.layers) == (EXPERTS, TOP_K, MOE_LAYERS[family])
    assert torch.equal(forward(adapted), untouched)  # a fresh adapter is zero

    torch.manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    routes_RLK = foreign_routes(routers)
    routers.replay(routes_RLK, everywhere())
    logits, gradients = step(adapted)

    assert torch.equal(routers.routed_RLK, routes_RLK)
    assert not same_sets(routers.live_RLK, routes_RLK).all()
    assert not torch.allclose(logits, untouched, atol=1e-2)
    adapters = filter(is_adapter, adapted.state_dict())
    # These sequences are shorter than what DeepSeek-V4 compresses.
    assert gradients.keys() == {name for name in adapters if ".compressor." not in name}

    train_routers(adapted)
    assert all(one.abs().max() > 0 for one in router_gradients(routers, step(adapted)[1]).values())

    whole = {name: value.detach() for name, value in adapted.state_dict().items()}
    before = {name: value.clone() for name, value in whole.items()}
    merged = build(family)
    merged.load_state_dict(merged_weights(adapted, whole))
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    others = Routers(merged)
    others.replay(routes_RLK, everywhere())
    torch.testing.assert_close(forward(merged), logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
