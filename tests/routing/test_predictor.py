"""The predictor file: what is saved comes back, the same bytes each time, and nothing else is taken for it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.predictor import EvolutionPredictor, EvolutionSource, PredictorProvenance

SHAPE = (4, 6)
PROVENANCE = PredictorProvenance(
    run_id="run-1",
    iteration=3,
    layers=(0, 2, 11),
    num_experts=4,
    hidden_size=6,
    evolution=(EvolutionSource(uri="iterations/00003/training", sha256="a" * 64),),
    objective="ridge",
)


def predictor_of(*layers: int) -> EvolutionPredictor:
    generator = torch.Generator().manual_seed(0)
    return EvolutionPredictor({layer: torch.randn(SHAPE, generator=generator) for layer in layers}, PROVENANCE)


@pytest.mark.parametrize("layers", [(), (2,), (11, 0, 2)])
def test_a_saved_predictor_comes_back(tmp_path, layers):
    predictor = predictor_of(*layers)
    predictor.save(tmp_path / "predictor.safetensors")
    loaded = EvolutionPredictor.load(tmp_path / "predictor.safetensors")
    assert loaded.provenance == PROVENANCE
    assert list(loaded.weights) == sorted(layers)
    assert all(torch.equal(loaded.weights[layer], predictor.weights[layer]) for layer in layers)


def test_equal_predictors_give_equal_bytes():
    assert len({predictor_of(0, 2, 11).to_bytes() for _ in range(20)}) == 1


def test_the_file_is_plain_safetensors(tmp_path):
    predictor_of(0, 11).save(tmp_path / "predictor.safetensors")
    with safe_open(tmp_path / "predictor.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["layers.0.weight", "layers.11.weight"]
        assert file.get_tensor("layers.11.weight").shape == SHAPE
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("moe-replay-predictor", "1")
    assert json.loads(metadata["provenance"])["layers"] == [0, 2, 11]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_truncated_or_altered_file_is_taken(data):
    whole = predictor_of(0, 2).to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    cut = data.draw(st.booleans())
    damaged = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    try:
        read = EvolutionPredictor.from_bytes(damaged, "predictor")
    except ArchiveCorrupt:
        return
    # A blank between the parts of the header says nothing.
    assert read.to_bytes() == whole


def test_another_format_or_version_is_refused():
    for metadata in ({}, {"format": "moe-replay-predictor", "format_version": "2"}, {"format": "pt"}):
        with pytest.raises(ArchiveCorrupt, match="this code reads"):
            EvolutionPredictor.from_bytes(save({"layers.0.weight": torch.zeros(SHAPE)}, metadata), "predictor")


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({1: torch.zeros(SHAPE)}, "none of the model's MoE layers"),
        ({0: torch.zeros(SHAPE[::-1])}, r"of shape \(6, 4\), expected"),
        ({0: torch.zeros(SHAPE, dtype=torch.float64)}, "torch.float64"),
        ({2: torch.full(SHAPE, torch.nan)}, "holds 24 numbers that are not finite"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(weights, told):
    with pytest.raises(RoutingMismatch, match=told):
        EvolutionPredictor(weights, PROVENANCE)


@pytest.mark.parametrize("model", [(8, 6, (0, 2, 11)), (4, 8, (0, 2, 11)), (4, 6, (0, 2, 10)), (4, 6, (0, 2))])
def test_a_predictor_of_another_model_is_refused(model):
    predictor_of(0).require_model(4, 6, (0, 2, 11))
    with pytest.raises(RoutingMismatch, match="fit one from this model's evolution"):
        predictor_of(0).require_model(*model)


@pytest.mark.parametrize("place", [("run-1", 2), ("run-1", 4), ("run-2", 3)])
def test_a_predictor_of_another_run_or_iteration_is_refused(place):
    predictor_of(0).require_fitted_in("run-1", 3)
    with pytest.raises(RoutingMismatch, match="stale or of another run"):
        predictor_of(0).require_fitted_in(*place)
