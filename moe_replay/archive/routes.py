"""The routing archive: a zarr v3 group that is read by layer range and token range.

Group `routes` of an artifact; legend: T tokens of all sequences one after the other, L MoE layers, K experts per
token, N sequences.

    ids            [L, T, K] uint8 or uint16   layer-major, chunks of one layer, so a layer is read without the others
    valid          [T]       bool              False where no route was captured
    offsets        [N + 1]   int64             sequence i is tokens offsets[i]..offsets[i+1]-1
    token_digests  [N, 16]   uint8             BLAKE2b of each sequence's token ids
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import cast

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_replay.archive.reading import Artifact
from moe_replay.archive.route_writing import (
    DIGEST_BYTES,
    FORMAT,
    FORMAT_VERSION,
    GROUP,
    RouteOrigin,
    RouteProvenance,
    token_digest,
    write_routes,
)
from moe_replay.errors import ArchiveCorrupt, ReplayError, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace, check_layers, route_dtype

__all__ = [
    "RouteArchive",
    "RouteOrigin",
    "RouteProvenance",
    "RouteSummary",
    "token_digest",
    "verify_routes",
    "write_routes",
]


class RouteSummary(BaseModel):
    """What `moe-replay archive inspect` tells of one archive."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    sequences: int
    layers: int
    experts: int
    top_k: int
    captured_rows: int
    missing_rows: int
    bytes: int
    """All objects of the artifact, metadata and commit included."""
    bytes_per_token: float
    """`bytes` over `tokens`; 0 for an empty archive."""
    provenance: RouteProvenance


class RouteArchive:
    """The routes of one artifact, opened for reading; every chunk is checked when it is read."""

    def __init__(self, artifact: Artifact, group: zarr.Group, provenance: RouteProvenance) -> None:
        self.artifact = artifact
        self.provenance = provenance
        self._ids = _array(artifact, group, "ids")
        self._valid = _array(artifact, group, "valid")
        offsets, digests = _array(artifact, group, "offsets"), _array(artifact, group, "token_digests")
        self._check_shapes(offsets, digests)
        self._offsets = cast(npt.NDArray[np.int64], offsets[:])
        self._digests = cast(npt.NDArray[np.uint8], digests[:])
        self._check_offsets()

    @classmethod
    def open(cls, artifact: Artifact) -> "RouteArchive":
        """Open and check everything but the routes themselves.

        Raises ArchiveCorrupt when an object is damaged, or the archive is of another run, iteration or shape.
        """
        try:
            group = zarr.open_group(artifact.zarr_store(GROUP), mode="r", zarr_format=3)
            attributes = dict(group.attrs)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ReplayError):
                raise
            raise _corrupt(artifact, f"it holds no readable zarr group {GROUP!r} ({type(error).__name__})") from error
        found = (attributes.get("format"), attributes.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise _corrupt(artifact, f"its format is {found}, this code reads {(FORMAT, FORMAT_VERSION)}")
        try:
            provenance = RouteProvenance.model_validate(attributes.get("provenance"))
            check_layers(provenance.layers)
        except (ValidationError, RoutingMismatch) as error:
            raise _corrupt(artifact, "its provenance breaks the format") from error
        ours = (artifact.commit.run_id, artifact.commit.iteration)
        if (provenance.run_id, provenance.iteration) != ours:
            raise _corrupt(
                artifact,
                f"its routes are of run {provenance.run_id}, iteration {provenance.iteration}, "
                f"its commit of run {ours[0]}, iteration {ours[1]}",
            )
        return cls(artifact, group, provenance)

    @property
    def num_tokens(self) -> int:
        """T over all sequences."""
        return int(self._offsets[-1])

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self._offsets) - 1

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layer index of each MoE layer."""
        return self.provenance.layers

    @property
    def token_digests(self) -> list[bytes]:
        """The token digest of each sequence."""
        return [row.tobytes() for row in self._digests]

    def read(self, tokens: slice, layers: slice | None = None) -> RoutingTrace:
        """The routes of a token range and a range of MoE layers (positions in `layers`, not decoder indices).

        Reads only the chunks that hold them. Raises ArchiveCorrupt when one of these is damaged, RoutingMismatch
        when the range leaves the archive or what it holds is no routing.
        """
        rows = _whole_range(tokens, self.num_tokens, "tokens")
        columns = _whole_range(layers or slice(None), len(self.layers), "MoE layers")
        if rows.start == rows.stop:
            ids_LTK = np.zeros((columns.stop - columns.start, 0, self.provenance.top_k), self._ids.dtype)
            valid_T = np.zeros(0, dtype=bool)
        else:
            ids_LTK = cast(np.ndarray, self._ids[columns, rows, :])
            valid_T = cast(npt.NDArray[np.bool_], self._valid[rows])
        ids_TLK = np.ascontiguousarray(ids_LTK.transpose(1, 0, 2))
        return RoutingTrace(ids_TLK, valid_T, self.provenance.num_experts, self.layers[columns])

    def read_sequences(self, start: int, stop: int, layers: slice | None = None) -> list[RoutingTrace]:
        """The traces of sequences start..stop-1; reads and raises as `read` does."""
        _whole_range(slice(start, stop), self.num_sequences, "sequences")
        first = int(self._offsets[start])
        together = self.read(slice(first, int(self._offsets[stop])), layers)
        ends = self._offsets[start : stop + 1] - first
        return [together.slice_tokens(int(a), int(b)) for a, b in pairwise(ends)]

    def require_tokens(self, digests: Sequence[bytes]) -> None:
        """Raise RoutingMismatch, naming the first sequence that differs, unless the routes are of these tokens."""
        if len(digests) != self.num_sequences:
            raise RoutingMismatch(
                f"{self.artifact.name} holds routes of {self.num_sequences} sequences, the rollout has {len(digests)}; "
                "the two are of different rollouts: archive the rollout's own routes"
            )
        for i, (stored, wanted) in enumerate(zip(self.token_digests, digests, strict=True)):
            if stored != wanted:
                raise RoutingMismatch(
                    f"{self.artifact.name} holds routes of other tokens: sequence {i} has digest {stored.hex()}, the "
                    f"rollout's has {wanted.hex()}; the two are of different rollouts or differ in order: archive the "
                    "rollout's own routes"
                )

    def summary(self) -> RouteSummary:
        """Counts and sizes, without reading routes."""
        commit = self.artifact.commit
        size = commit.num_bytes + len(commit.to_bytes())
        return RouteSummary(
            tokens=self.num_tokens,
            sequences=self.num_sequences,
            layers=len(self.layers),
            experts=self.provenance.num_experts,
            top_k=self.provenance.top_k,
            captured_rows=self.provenance.captured_rows,
            missing_rows=self.provenance.missing_rows,
            bytes=size,
            bytes_per_token=size / self.num_tokens if self.num_tokens else 0.0,
            provenance=self.provenance,
        )

    def chunks(self) -> Iterator[slice]:
        """Token ranges that together cover the archive, each of whole chunks."""
        step = self._ids.chunks[1]
        for start in range(0, self.num_tokens, step):
            yield slice(start, min(start + step, self.num_tokens))

    def _check_shapes(self, offsets: zarr.Array, digests: zarr.Array) -> None:
        origin = self.provenance
        num_tokens, num_sequences = origin.captured_rows + origin.missing_rows, digests.shape[0]
        expected = {
            "ids": (self._ids, (len(origin.layers), num_tokens, origin.top_k), route_dtype(origin.num_experts)),
            "valid": (self._valid, (num_tokens,), np.bool_),
            "offsets": (offsets, (num_sequences + 1,), np.int64),
            "token_digests": (digests, (num_sequences, DIGEST_BYTES), np.uint8),
        }
        for name, (array, shape, dtype) in expected.items():
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise _corrupt(
                    self.artifact,
                    f"array {name} is {array.dtype} of shape {array.shape}, its provenance says {np.dtype(dtype)} of "
                    f"shape {shape}",
                )

    def _check_offsets(self) -> None:
        num_tokens = self._ids.shape[1]
        if self._offsets[0] != 0 or self._offsets[-1] != num_tokens or (np.diff(self._offsets) < 0).any():
            raise _corrupt(
                self.artifact,
                f"offsets must rise from 0 to {num_tokens}; they go from {self._offsets[0]} to {self._offsets[-1]} "
                f"with a smallest step of {np.diff(self._offsets).min(initial=0)}",
            )


def verify_routes(artifact: Artifact) -> list[str]:
    """Re-read every object and every route; what breaks a checksum or an invariant, one line each."""
    problems = artifact.problems()
    if problems:
        return problems
    captured = 0
    try:
        archive = RouteArchive.open(artifact)
        for rows in archive.chunks():
            captured += int(archive.read(rows).valid_T.sum())
    except ReplayError as error:
        return [f"{artifact.name}: {error}"]
    if captured != archive.provenance.captured_rows:
        stated = archive.provenance.captured_rows
        return [f"{artifact.name}: {captured} rows are valid, its provenance says {stated} were captured"]
    return []


def _array(artifact: Artifact, group: zarr.Group, name: str) -> zarr.Array:
    """An array of the group, all of whose chunks the commit names: zarr reads an absent one as zeros."""
    try:
        array = group[name]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ReplayError):
            raise
        raise _corrupt(artifact, f"array {name} can't be read ({type(error).__name__})") from error
    if not isinstance(array, zarr.Array):
        raise _corrupt(artifact, f"{name} is not an array")
    committed = {stored.path for stored in artifact.commit.objects}
    for index in product(*(range(-(-size // chunk)) for size, chunk in zip(array.shape, array.chunks, strict=True))):
        path = f"{GROUP}/{name}/{array.metadata.encode_chunk_key(index)}"
        if path not in committed:
            raise _corrupt(artifact, f"its commit does not name {path}, a chunk of shape {array.shape}")
    return array


def _whole_range(part: slice, size: int, name: str) -> slice:
    start, stop = 0 if part.start is None else part.start, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise RoutingMismatch(
            f"{name} {start}:{stop} (step {part.step}) is no range of the archive's {size} {name}; "
            "read a range inside it"
        )
    return slice(start, stop)


def _corrupt(artifact: Artifact, what: str) -> ArchiveCorrupt:
    return ArchiveCorrupt(
        f"routing archive {artifact.name} is not what it should be: {what}; restore it, or delete the stage's "
        "folder and resume the run to make it again"
    )
