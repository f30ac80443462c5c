"""The arrays of a stored routing archive, opened only when they are what the format says."""

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from moe_replay.archive.provenance import RouteProvenance
from moe_replay.archive.reading import Artifact
from moe_replay.archive.route_writing import DIGEST_BYTES, FORMAT
from moe_replay.archive.zarr_groups import PLAIN_CODECS, codec_names, codecs, first_line
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import check_layers, route_dtype

EXPERT_SET = "moe-replay.expert-set"
_CODECS = {"ids": (PLAIN_CODECS, (EXPERT_SET, "crc32c"))}
"""Codec chains that an array may have; all but `ids` have the plain one."""


def corrupt(artifact: Artifact, what: str) -> ArchiveCorrupt:
    """The error that says what of an artifact is wrong."""
    return FORMAT.corrupt(artifact, what)


def open_provenance(artifact: Artifact) -> tuple[zarr.Group, RouteProvenance]:
    """The zarr group and its provenance.

    Raises ArchiveCorrupt unless the format is known and the archive is of the run and iteration of its commit.
    """
    group, provenance = FORMAT.open(artifact, RouteProvenance)
    try:
        check_layers(provenance.layers)
    except RoutingMismatch as error:
        raise corrupt(artifact, f"its provenance breaks the format: {first_line(error)}") from error
    return group, provenance


def open_arrays(artifact: Artifact, group: zarr.Group, provenance: RouteProvenance) -> dict[str, zarr.Array]:
    """`ids`, `valid`, `offsets` and `token_digests`, all of whose chunks the commit names; none is read yet."""
    arrays = {
        name: FORMAT.open_array(artifact, group, name, _CODECS.get(name, (PLAIN_CODECS,)))
        for name in ("ids", "valid", "offsets", "token_digests")
    }
    num_tokens, num_sequences = provenance.tokens, arrays["token_digests"].shape[0]
    layers, top_k = len(provenance.layers), provenance.top_k
    chunk = arrays["valid"].chunks[0]
    FORMAT.require(artifact, arrays["ids"], (layers, num_tokens, top_k), route_dtype(provenance.num_experts))
    FORMAT.require(artifact, arrays["valid"], (num_tokens,), np.bool_)
    FORMAT.require(artifact, arrays["offsets"], (num_sequences + 1,), np.int64)
    FORMAT.require(artifact, arrays["token_digests"], (num_sequences, DIGEST_BYTES), np.uint8)
    if arrays["ids"].chunks != (1, chunk, top_k):
        raise corrupt(artifact, f"ids has chunks of {arrays['ids'].chunks}, expected (1, {chunk}, {top_k}) as of valid")
    for i, rows in enumerate(provenance.row_groups):
        if rows.first_token // chunk != (rows.first_token + rows.tokens - 1) // chunk:
            raise corrupt(artifact, f"row group {i} of {rows.tokens} tokens crosses a chunk of {chunk} tokens")
    _check_expert_sets(artifact, arrays["ids"], provenance)
    return arrays


def codec_name(array: zarr.Array) -> str:
    """What compresses an array: `expert-set` or `zstd`."""
    return "expert-set" if codec_names(array)[0] == EXPERT_SET else "zstd"


def read_part(artifact: Artifact, array: zarr.Array, part: Any) -> npt.NDArray[Any]:
    """A part of an array; raises ArchiveCorrupt when a chunk of it can't be decoded."""
    return FORMAT.read_part(artifact, array, part)


def _check_expert_sets(artifact: Artifact, ids: zarr.Array, provenance: RouteProvenance) -> None:
    if codec_name(ids) != "expert-set":
        return
    settings = codecs(ids)[0].get("configuration", {})
    found = settings.get("num_experts"), settings.get("keep_order")
    expected = provenance.num_experts, provenance.order == "engine"
    if found != expected:
        raise corrupt(artifact, f"its codec has (experts, order kept) = {found}, its provenance says {expected}")
