"""Merging predictors into a checkpoint's routers, without an engine."""

import pytest
import torch
from predictors import gate_name, write_predictor
from safetensors.torch import save_file

from moe_replay.engines.merged_gates import MergedGates
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch

LAYERS, SHAPE = (1, 2), (8, 4)
FLOAT32, BFLOAT16 = (dict.fromkeys(LAYERS, dtype) for dtype in (torch.float32, torch.bfloat16))


def checkpoint(folder, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {gate_name(layer): torch.randn(SHAPE, generator=generator).to(dtype) for layer in LAYERS}
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.ones(8)
    tensors["model.norm.weight"] = torch.ones(4, dtype=dtype)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def predictor(folder, scale=0.1, used=(2,), layers=LAYERS, shape=SHAPE):
    return write_predictor(folder / "predictor.safetensors", scale, used, layers, shape)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_predicted_routers_change_and_by_the_predictor_in_float32(tmp_path, dtype):
    tensors = checkpoint(tmp_path, dtype)
    path = predictor(tmp_path)
    merged = dict(MergedGates(tmp_path, path, LAYERS).merge(tensors.items()))
    assert merged.keys() == tensors.keys()
    changed = [name for name in tensors if merged[name] is not tensors[name]]
    assert changed == [gate_name(2)]
    added = merged[gate_name(2)] - tensors[gate_name(2)].float()
    assert merged[gate_name(2)].dtype == torch.float32
    assert added.std() == pytest.approx(0.1, rel=0.3)


def test_without_a_predictor_nothing_changes(tmp_path):
    tensors = checkpoint(tmp_path)
    gates = MergedGates(tmp_path, None, LAYERS)
    assert all(tensor is tensors[name] for name, tensor in gates.merge(tensors.items()))
    assert gates.fidelity(FLOAT32) is None


def test_the_routers_of_a_checkpoint_are_read_alone_and_whole(tmp_path):
    tensors = checkpoint(tmp_path)
    read = dict(MergedGates(tmp_path, None, LAYERS).router_tensors())
    assert read.keys() == tensors.keys() - {"model.norm.weight"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())


def test_a_router_that_is_not_loaded_with_its_checkpoint_is_missed(tmp_path):
    tensors = checkpoint(tmp_path)
    gates = MergedGates(tmp_path, predictor(tmp_path), LAYERS)
    with pytest.raises(RoutingMismatch, match=r"has not read \['model.layers.2.mlp.gate.weight'\]"):
        list(gates.merge((name, tensor) for name, tensor in tensors.items() if name != gate_name(2)))


def test_a_small_predictor_survives_in_float32_and_less_so_in_bfloat16(tmp_path):
    checkpoint(tmp_path)
    small, large = (MergedGates(tmp_path, predictor(tmp_path, scale), LAYERS) for scale in (0.003, 0.3))
    assert small.fidelity(FLOAT32) == pytest.approx(1, abs=1e-6)
    assert small.fidelity(BFLOAT16) < 0.8
    assert small.fidelity(BFLOAT16) < large.fidelity(BFLOAT16) < small.fidelity(FLOAT32)


@pytest.mark.parametrize("used", [(), (1, 2)])
def test_a_predictor_of_zero_has_no_fidelity(tmp_path, used):
    checkpoint(tmp_path)
    assert MergedGates(tmp_path, predictor(tmp_path, 0.0, used), LAYERS).fidelity(BFLOAT16) is None


@pytest.mark.parametrize(
    "foreign", [{"layers": (1, 2, 3)}, {"layers": (0, 2)}, {"shape": (16, 4)}, {"shape": (8, 8)}], ids=str
)
def test_a_predictor_of_another_model_is_refused(tmp_path, foreign):
    checkpoint(tmp_path)
    with pytest.raises(RoutingMismatch, match="is of a model with"):
        MergedGates(tmp_path, predictor(tmp_path, **foreign), LAYERS)


def test_a_file_that_is_no_predictor_is_refused(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(ArchiveCorrupt):
        MergedGates(tmp_path, tmp_path / "model.safetensors", LAYERS)
