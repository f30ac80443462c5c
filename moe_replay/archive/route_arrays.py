"""The arrays of a stored routing archive, opened only when they are what the format says."""

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import ValidationError

from moe_replay.archive.provenance import RouteProvenance
from moe_replay.archive.reading import Artifact
from moe_replay.archive.route_writing import DIGEST_BYTES, FORMAT, FORMAT_VERSION, GROUP
from moe_replay.errors import ArchiveCorrupt, ReplayError, RoutingMismatch
from moe_replay.routing.trace import check_layers, route_dtype

EXPERT_SET = "moe-replay.expert-set"
_PLAIN = ("bytes", "zstd", "crc32c")
_CODECS = {"ids": (_PLAIN, (EXPERT_SET, "crc32c"))}
"""Codec chains that an array may have; all but `ids` have the plain one."""


def corrupt(artifact: Artifact, what: str) -> ArchiveCorrupt:
    """The error that says what of an artifact is wrong."""
    return ArchiveCorrupt(
        f"routing archive {artifact.name} is not what it should be: {what}; restore it, or delete the stage's "
        "folder and resume the run to make it again"
    )


def open_provenance(artifact: Artifact) -> tuple[zarr.Group, RouteProvenance]:
    """The zarr group and its provenance.

    Raises ArchiveCorrupt unless the format is known and the archive is of the run and iteration of its commit.
    """
    commit = artifact.commit
    if commit.stage != "routes":
        raise corrupt(artifact, f"it was committed by stage {commit.stage!r}, expected 'routes'")
    try:
        group = zarr.open_group(artifact.zarr_store(GROUP), mode="r", zarr_format=3)
        attributes = dict(group.attrs)
    except ReplayError:
        raise
    except Exception as error:  # zarr meets malformed metadata with errors of any kind
        raise corrupt(artifact, f"it holds no readable zarr group {GROUP!r} ({type(error).__name__})") from error
    found = (attributes.get("format"), attributes.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise corrupt(artifact, f"its format is {found}, this code reads {(FORMAT, FORMAT_VERSION)}")
    try:
        provenance = RouteProvenance.model_validate(attributes.get("provenance"))
        check_layers(provenance.layers)
    except (ValidationError, RoutingMismatch) as error:
        raise corrupt(artifact, f"its provenance breaks the format: {_first_line(error)}") from error
    ours, theirs = (commit.run_id, commit.iteration), (provenance.run_id, provenance.iteration)
    if ours != theirs:
        raise corrupt(
            artifact,
            f"its routes are of run {theirs[0]}, iteration {theirs[1]}, its commit of run {ours[0]}, iteration "
            f"{ours[1]}",
        )
    return group, provenance


def open_arrays(artifact: Artifact, group: zarr.Group, provenance: RouteProvenance) -> dict[str, zarr.Array]:
    """`ids`, `valid`, `offsets` and `token_digests`, all of whose chunks the commit names; none is read yet."""
    arrays = {name: _open_array(artifact, group, name) for name in ("ids", "valid", "offsets", "token_digests")}
    num_tokens, num_sequences = provenance.tokens, arrays["token_digests"].shape[0]
    layers, top_k = len(provenance.layers), provenance.top_k
    chunk = arrays["valid"].chunks[0]
    _require(artifact, arrays, "ids", (layers, num_tokens, top_k), route_dtype(provenance.num_experts))
    _require(artifact, arrays, "valid", (num_tokens,), np.bool_)
    _require(artifact, arrays, "offsets", (num_sequences + 1,), np.int64)
    _require(artifact, arrays, "token_digests", (num_sequences, DIGEST_BYTES), np.uint8)
    if arrays["ids"].chunks != (1, chunk, top_k):
        raise corrupt(artifact, f"ids has chunks of {arrays['ids'].chunks}, expected (1, {chunk}, {top_k}) as of valid")
    for i, rows in enumerate(provenance.row_groups):
        if rows.first_token // chunk != (rows.first_token + rows.tokens - 1) // chunk:
            raise corrupt(artifact, f"row group {i} of {rows.tokens} tokens crosses a chunk of {chunk} tokens")
    _check_expert_sets(artifact, arrays["ids"], provenance)
    return arrays


def codec_name(array: zarr.Array) -> str:
    """What compresses an array: `expert-set` or `zstd`."""
    return "expert-set" if _codec_names(array)[0] == EXPERT_SET else "zstd"


def read_part(artifact: Artifact, array: zarr.Array, part: Any) -> npt.NDArray[Any]:
    """A part of an array; raises ArchiveCorrupt when a chunk of it can't be decoded."""
    try:
        return np.asarray(array[part])
    except ReplayError:
        raise
    except Exception as error:  # codecs of zarr meet bytes that aren't theirs with errors of any kind
        raise corrupt(
            artifact, f"a chunk of {GROUP}/{array.basename} in {part} can't be decoded ({_first_line(error)})"
        ) from error


def _open_array(artifact: Artifact, group: zarr.Group, name: str) -> zarr.Array:
    try:
        array = group[name]
    except ReplayError:
        raise
    except Exception as error:  # as for the group
        raise corrupt(artifact, f"array {name} can't be read ({type(error).__name__})") from error
    if not isinstance(array, zarr.Array):
        raise corrupt(artifact, f"{name} is not an array")
    allowed = _CODECS.get(name, (_PLAIN,))
    if _codec_names(array) not in allowed:
        raise corrupt(artifact, f"array {name} has the codecs {_codec_names(array)}, the format knows {allowed}")
    # zarr reads a chunk that is not there as zeros.
    committed = {stored.path for stored in artifact.commit.objects}
    for index in product(*(range(-(-size // chunk)) for size, chunk in zip(array.shape, array.chunks, strict=True))):
        path = f"{GROUP}/{name}/{array.metadata.encode_chunk_key(index)}"
        if path not in committed:
            raise corrupt(artifact, f"its commit does not name {path}, a chunk of shape {array.shape}")
    return array


def _codec_names(array: zarr.Array) -> tuple[str, ...]:
    return tuple(str(codec["name"]) for codec in _codecs(array))


def _codecs(array: zarr.Array) -> list[Any]:
    return array.metadata.to_dict()["codecs"]  # pyright: ignore[reportReturnType]


def _require(
    artifact: Artifact, arrays: dict[str, zarr.Array], name: str, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> None:
    array, dtype = arrays[name], np.dtype(dtype)
    if array.shape != shape or array.dtype != dtype:
        raise corrupt(
            artifact,
            f"array {name} is {array.dtype} of shape {array.shape}, its provenance says {dtype} of shape {shape}",
        )


def _check_expert_sets(artifact: Artifact, ids: zarr.Array, provenance: RouteProvenance) -> None:
    if codec_name(ids) != "expert-set":
        return
    settings = _codecs(ids)[0].get("configuration", {})
    found = settings.get("num_experts"), settings.get("keep_order")
    expected = provenance.num_experts, provenance.order == "engine"
    if found != expected:
        raise corrupt(artifact, f"its codec has (experts, order kept) = {found}, its provenance says {expected}")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0][:200] or type(error).__name__
