"""What identifies the router weights of a Hugging Face checkpoint.

The digest is the SHA-256 of a canonical JSON object (`moe_replay.archive.commits.canonical_json`) that maps each MoE
layer's decoder index, as a string, to the tensors of its router, and each of these to `dtype` (as safetensors names
it, `BF16`), `shape` and `sha256` (of its bytes in the file). A tensor belongs to the router of layer 7 when its name
has the components `7` and after it `gate` or `router`; it is called by what follows, e.g. `weight` or
`e_score_correction_bias`. Tensors are taken as stored, before an engine rounds them to its dtype.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_replay.archive.commits import canonical_json, sha256_hex

_ROUTER_NAMES = ("gate", "router")
_DRAFT_PREFIX = "mtp"  # layers that predict further tokens are counted anew from 0


def digest_gates(folder: Path, layers: Iterable[int]) -> str | None:
    """The digest of the routers of `layers` in the safetensors files of `folder`; only these tensors are read.

    None when a layer's router isn't found, or two tensors claim to be the same part of it.
    """
    gates: dict[str, dict[str, Any]] = {}
    for layer, name, described in _router_tensors(folder):
        if name in gates.setdefault(layer, {}):
            return None
        gates[layer][name] = described
    wanted = [str(layer) for layer in layers]
    if not gates.keys() >= set(wanted):
        return None
    return sha256_hex(canonical_json({layer: gates[layer] for layer in wanted}))


def _router_tensors(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for tensor, about in header.items():
                place = _place_of(tensor)
                if place is None:
                    continue
                start, stop = about["data_offsets"]
                file.seek(8 + size + start)
                sha256 = hashlib.sha256(file.read(stop - start)).hexdigest()
                yield *place, {"dtype": about["dtype"], "shape": about["shape"], "sha256": sha256}


def _place_of(tensor: str) -> tuple[str, str] | None:
    """(Decoder layer, name within the router) of a tensor; none when it is of no router."""
    parts = tensor.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    router = next((i for i in range(layer, len(parts)) if parts[i] in _ROUTER_NAMES), None)
    if router is None or parts[0].startswith(_DRAFT_PREFIX):
        return None
    return parts[layer], ".".join(parts[router + 1 :])
