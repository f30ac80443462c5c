"""Predictor files, and what they make of a model on disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_replay.routing.predictor import EvolutionPredictor, PredictorProvenance

LAYERS, NUM_EXPERTS, HIDDEN_SIZE = (0, 1, 2, 3), 16, 64
"""Of the embedded model."""


def write_predictor(
    path: Path,
    scale: float,
    used: Sequence[int] = (0, 2, 3),
    layers: tuple[int, ...] = LAYERS,
    shape: tuple[int, int] = (NUM_EXPERTS, HIDDEN_SIZE),
) -> tuple[Path, str]:
    """A random predictor for the `used` of a model's `layers`, and a name for it."""
    generator = torch.Generator().manual_seed(3)
    weights = {layer: scale * torch.randn(shape, generator=generator) for layer in used}
    provenance = PredictorProvenance(
        run_id="run",
        iteration=0,
        layers=layers,
        num_experts=shape[0],
        hidden_size=shape[1],
        evolution=(),
        objective="ridge",
    )
    EvolutionPredictor(weights, provenance).save(path)
    return path, f"{path.stem} {scale} {used}"


def gate_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_weights(model: Path, tensors: dict[str, Tensor], folder: Path) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_merged(model: Path, predictor: Path, folder: Path) -> Path:
    """The model with W + W_p in the place of its routers' W, summed in float32."""
    tensors = weights_of(model)
    for layer, weight_EH in EvolutionPredictor.load(predictor).weights.items():
        tensors[gate_name(layer)] = tensors[gate_name(layer)].float() + weight_EH
    return write_weights(model, tensors, folder)
