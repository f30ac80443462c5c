"""The router weights of a Hugging Face checkpoint: where they are, and what identifies them.

A tensor belongs to the router of layer 7 when its name has the components `7` and after it `gate` or `router`; its
part in the router is what follows, e.g. `weight` or `e_score_correction_bias`.

The digest is the SHA-256 of a canonical JSON object (`moe_replay.archive.commits.canonical_json`) that maps each MoE
layer's decoder index, as a string, to the parts of its router, and each of these to `dtype` (as safetensors names
it, `BF16`), `shape` and `sha256` (of its bytes in the file). Tensors are taken as stored, before an engine rounds
them to its dtype.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_replay.archive.commits import canonical_json, sha256_hex
from moe_replay.errors import RoutingMismatch
from moe_replay.router_names import ROUTER_NAMES

_DRAFT_PREFIX = "mtp"  # layers that predict further tokens are counted anew from 0
_PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class RouterTensor:
    """One tensor of a router, as the header of its safetensors file describes it."""

    name: str
    """Its name in the checkpoint."""
    layer: int
    """Decoder layer."""
    part: str
    """Its name within the router."""
    file: Path
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    stop: int

    @property
    def is_matrix(self) -> bool:
        """Whether it is what the router multiplies hidden states with: [E, H], not quantised."""
        return len(self.shape) == 2 and self.dtype in _PLAIN_FLOATS

    def describe(self) -> dict[str, Any]:
        """What the digest says of it; reads its bytes."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            sha256 = hashlib.sha256(file.read(self.stop - self.start)).hexdigest()
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": sha256}


def digest_gates(folder: Path, layers: Iterable[int]) -> str | None:
    """The digest of the routers of `layers` in the safetensors files of `folder`; only these tensors are read.

    None when a layer's router isn't found, or two tensors claim to be the same part of it.
    """
    gates: dict[int, dict[str, RouterTensor]] = {layer: {} for layer in layers}
    for tensor in router_tensors(folder):
        if tensor.layer in gates:
            if tensor.part in gates[tensor.layer]:
                return None
            gates[tensor.layer][tensor.part] = tensor
    if not all(gates.values()):
        return None
    described = {
        str(layer): {part: tensor.describe() for part, tensor in parts.items()} for layer, parts in gates.items()
    }
    return sha256_hex(canonical_json(described))


def router_matrices(folder: Path, layers: Iterable[int]) -> dict[int, RouterTensor]:
    """The weight of each of `layers`' routers; only the files' headers are read.

    Raises RoutingMismatch for a router that isn't found, or isn't one matrix of floating-point numbers.
    """
    found: dict[int, list[RouterTensor]] = {layer: [] for layer in layers}
    for tensor in router_tensors(folder):
        if tensor.layer in found and tensor.is_matrix:
            found[tensor.layer].append(tensor)
    for layer, matrices in found.items():
        if len(matrices) != 1:
            names = ", ".join(tensor.name for tensor in matrices) or "none"
            raise RoutingMismatch(
                f"a router that can be predicted has one weight of shape [E, H] in {', '.join(_PLAIN_FLOATS)}; that of "
                f"decoder layer {layer} in {folder} has {len(matrices)} ({names}): take a method without a predictor"
            )
    return {layer: matrices[0] for layer, matrices in found.items()}


def router_tensors(folder: Path) -> Iterator[RouterTensor]:
    """All tensors of routers in the safetensors files of `folder`; only the files' headers are read."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, about in header.items():
            if place := place_of(name):
                start, stop = (8 + size + offset for offset in about["data_offsets"])
                yield RouterTensor(name, *place, path, about["dtype"], tuple(about["shape"]), start, stop)


def place_of(name: str) -> tuple[int, str] | None:
    """(Decoder layer, part in its router) of a tensor or module by its dotted name; none when it is of no router."""
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    router = next((i for i in range(layer, len(parts)) if parts[i] in ROUTER_NAMES), None)
    if router is None or parts[0].startswith(_DRAFT_PREFIX):
        return None
    return int(parts[layer]), ".".join(parts[router + 1 :])
