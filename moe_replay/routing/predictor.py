"""Evolution predictors W_p, one per router, as a file that says what it is of (PR2, arXiv 2606.00395).

`predictor.safetensors` holds float32 `layers.<decoder layer>.weight` of shape [E, H], a router weight's orientation and
to be added to one. A layer that is not in the file predicts nothing. Legend: E experts, H hidden size.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moe_replay.errors import ArchiveCorrupt, RoutingMismatch

FORMAT = "moe-replay-predictor"
FORMAT_VERSION = "1"

_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.weight")
_LENGTH_BYTES = 8


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvolutionSource(_Record):
    """A training whose router evolution was fitted."""

    uri: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PredictorProvenance(_Record):
    """What a predictor is of: the run and iteration it was fitted in, the model's shape, what it saw."""

    run_id: str
    iteration: int = Field(ge=0)
    """The iteration whose training is the newest it was fitted from; it serves the rollout of the next."""
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer of the model, in use or not."""
    num_experts: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    evolution: tuple[EvolutionSource, ...]
    """Newest first."""
    objective: str


class EvolutionPredictor:
    """W_p of the layers in use, by decoder layer index."""

    def __init__(self, weights: Mapping[int, Tensor], provenance: PredictorProvenance) -> None:
        """Take float32 weights [E, H]; raises RoutingMismatch unless they are of the provenance's model and finite."""
        shape = (provenance.num_experts, provenance.hidden_size)
        for layer, weight_EH in weights.items():
            if layer not in provenance.layers:
                raise RoutingMismatch(
                    f"decoder layer {layer} has a predictor and is none of the model's MoE layers {provenance.layers}; "
                    "the predictor is of another model: fit one from this model's evolution"
                )
            if weight_EH.dtype != torch.float32 or tuple(weight_EH.shape) != shape:
                raise RoutingMismatch(
                    f"the predictor of decoder layer {layer} is {weight_EH.dtype} of shape {tuple(weight_EH.shape)}, "
                    f"expected torch.float32 of shape {shape}: fit one from this model's evolution"
                )
            if not bool(weight_EH.isfinite().all()):
                count = int((~weight_EH.isfinite()).sum())
                raise RoutingMismatch(
                    f"the predictor of decoder layer {layer} holds {count} numbers that are not finite, and would send "
                    "every token astray; fit it again"
                )
        self.weights = dict(sorted(weights.items()))
        self.provenance = provenance

    def save(self, path: Path) -> None:
        """Write the file; equal predictors give equal bytes."""
        path.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        tensors = {f"layers.{layer}.weight": weight_EH.contiguous() for layer, weight_EH in self.weights.items()}
        provenance = self.provenance.model_dump_json()
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "provenance": provenance,
            "sha256": _digest(provenance, tensors),
        }
        return _canonical(save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> "EvolutionPredictor":
        """Read a file; raises as `from_bytes` does."""
        return cls.from_bytes(path.read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "EvolutionPredictor":
        """Parse the bytes of the file called `name`.

        Raises ArchiveCorrupt unless they are a whole, unaltered predictor of a known format, RoutingMismatch when its
        weights are not those of the model it names.
        """
        way_out = "restore it, or fit it again"
        try:
            tensors = load(data)
            metadata = _header(data).get("__metadata__") or {}
        except (SafetensorError, ValueError) as error:
            raise ArchiveCorrupt(
                f"{name} is no readable safetensors file ({len(data)} bytes, {type(error).__name__}); {way_out}"
            ) from error
        found = metadata.get("format"), metadata.get("format_version")
        if found != (FORMAT, FORMAT_VERSION):
            raise ArchiveCorrupt(
                f"{name} has (format, version) = {found}, this code reads {(FORMAT, FORMAT_VERSION)}; give a predictor "
                "that this moe-replay fitted"
            )
        stated, actual = metadata.get("sha256"), _digest(metadata.get("provenance", ""), tensors)
        if stated != actual:
            raise ArchiveCorrupt(f"{name} was altered: its content has sha256 {actual}, it says {stated}; {way_out}")
        names = {key: _NAME.fullmatch(key) for key in tensors}
        unknown = [key for key, match in names.items() if match is None]
        if unknown:
            raise ArchiveCorrupt(f"{name} holds a tensor {unknown[0][:80]!r}, which is no layer's weight; {way_out}")
        try:
            provenance = PredictorProvenance.model_validate_json(metadata.get("provenance", ""))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ArchiveCorrupt(
                f"{name} has a provenance that breaks the format: {first['msg']}; {way_out}"
            ) from error
        return cls({int(match[1]): tensors[key] for key, match in names.items() if match}, provenance)

    def require_model(self, num_experts: int, hidden_size: int, layers: Sequence[int]) -> None:
        """Raise RoutingMismatch unless it is of a model with these experts, hidden size and MoE layers."""
        of = self.provenance
        found, expected = (of.num_experts, of.hidden_size, of.layers), (num_experts, hidden_size, tuple(layers))
        if found != expected:
            raise RoutingMismatch(
                f"the predictor of run {of.run_id}, iteration {of.iteration}, is of a model with (experts, hidden "
                f"size, MoE layers) = {found}, expected {expected}; fit one from this model's evolution"
            )

    def require_fitted_in(self, run_id: str, iteration: int) -> None:
        """Raise RoutingMismatch unless it was fitted in this iteration of this run: another's drift is another's."""
        found, expected = (self.provenance.run_id, self.provenance.iteration), (run_id, iteration)
        if found != expected:
            raise RoutingMismatch(
                f"the predictor was fitted in run {found[0]}, iteration {found[1]}, expected run {expected[0]}, "
                f"iteration {expected[1]}: it is stale or of another run; fit that iteration's own"
            )


def _digest(provenance: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of what the file says: `StageWriter`'s checksums don't follow a file that is handed around."""
    sha256 = hashlib.sha256(provenance.encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


def _header(data: bytes) -> dict:
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    return json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + size])


def _canonical(data: bytes) -> bytes:
    """The same file with its header in a fixed order: safetensors writes metadata in a new one each time."""
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.dumps(_header(data), sort_keys=True, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + data[_LENGTH_BYTES + size :]
