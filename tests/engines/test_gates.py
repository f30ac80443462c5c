import pytest
import torch
from safetensors.torch import save_file

from moe_replay.engines.gates import digest_gates, place_of, router_matrices
from moe_replay.errors import RoutingMismatch


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


def test_a_tensor_is_of_a_router_by_its_layer_and_name():
    assert place_of("model.layers.7.mlp.gate.weight") == (7, "weight")
    assert place_of("model.language_model.layers.0.block_sparse_moe.router.layer.weight") == (0, "layer.weight")
    assert place_of("model.layers.7.mlp.gate") == (7, "")
    for other in ("model.layers.7.mlp.gate_proj.weight", "gate.weight", "mtp.layers.0.mlp.gate.weight"):
        assert place_of(other) is None


@pytest.mark.parametrize("part", ["weight", "layer.weight"])
def test_the_weight_of_a_router_is_its_one_matrix(tmp_path, part):
    named = {name.replace("gate.weight", f"gate.{part}"): tensor for name, tensor in {**router(1), **router(2)}.items()}
    save_file({**named, **experts(1)}, tmp_path / "model.safetensors")
    found = router_matrices(tmp_path, [1, 2])
    assert {layer: (matrix.part, matrix.shape) for layer, matrix in found.items()} == dict.fromkeys(
        (1, 2), (part, (8, 4))
    )


def test_a_router_of_no_or_several_or_quantised_matrices_is_refused(tmp_path):
    quantised = torch.zeros(8, 4, dtype=torch.float8_e4m3fn)
    several = {"model.layers.1.mlp.router.a.weight": torch.ones(8, 4)}
    for tensors, number in ((experts(1), 0), ({"layers.1.gate.weight": quantised}, 0), ({**router(1), **several}, 2)):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(RoutingMismatch, match=rf"decoder layer 1 in .* has {number} "):
            router_matrices(tmp_path, [1])
