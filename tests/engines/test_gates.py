import pytest
import torch
from safetensors.torch import save_file

from moe_replay.engines.gates import digest_gates


def router(layer, prefix="model.layers", seed=0):
    generator = torch.Generator().manual_seed(seed + layer)
    weight = torch.randn(8, 4, generator=generator).to(torch.bfloat16)
    return {f"{prefix}.{layer}.mlp.gate.weight": weight, f"{prefix}.{layer}.mlp.gate.bias": torch.zeros(8)}


def experts(layer):
    return {f"model.layers.{layer}.mlp.experts.0.gate_proj.weight": torch.ones(2, 2)}


def digest(folder, *shards, layers=(1, 2)):
    folder.mkdir()
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{number}.safetensors")
    return digest_gates(folder, layers)


def test_the_digest_is_the_same_however_the_model_is_cut_into_files(tmp_path):
    whole = digest(tmp_path / "whole", {**router(1), **router(2), **experts(1)})
    cut = digest(tmp_path / "cut", {**router(2), **experts(2)}, router(1))
    assert whole == cut
    assert len(whole) == 64


@pytest.mark.parametrize("change", ["model.layers.2.mlp.gate.weight", "model.layers.1.mlp.gate.bias"])
def test_any_changed_router_weight_changes_the_digest(tmp_path, change):
    tensors = {**router(1), **router(2)}
    before = digest(tmp_path / "before", tensors)
    assert before != digest(tmp_path / "after", {**tensors, change: tensors[change] + 1})


def test_the_precision_in_which_routers_are_stored_counts(tmp_path):
    tensors = {**router(1), **router(2)}
    wider = {name: tensor.float() for name, tensor in tensors.items()}
    assert digest(tmp_path / "one", tensors) != digest(tmp_path / "other", wider)


def test_experts_and_layers_that_draft_tokens_do_not_count(tmp_path):
    tensors = {**router(1), **router(2)}
    more = {**tensors, **experts(1), **router(1, "mtp.layers", seed=7), **router(3)}
    assert digest(tmp_path / "one", tensors) == digest(tmp_path / "more", more)


def test_a_digest_that_would_not_be_of_all_routers_is_none(tmp_path):
    assert digest(tmp_path / "fewer", router(1)) is None
    assert digest(tmp_path / "twice", {**router(1), **router(2)}, {f"x.{k}": v for k, v in router(1).items()}) is None
