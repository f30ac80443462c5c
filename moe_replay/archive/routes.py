"""The routing archive: a zarr v3 group that is read by layer range and token range.

Group `routes` of an artifact; legend: T tokens of all sequences one after the other, L MoE layers, K experts per
token, N sequences. `docs/archive-format.md` is the specification.

    ids            [L, T, K] uint8 or uint16   layer-major, chunks of one layer, so a layer is read without the others
    valid          [T]       bool              False where no route was captured
    offsets        [N + 1]   int64             sequence i is tokens offsets[i]..offsets[i+1]-1
    token_digests  [N, 16]   uint8             BLAKE2b of each sequence's token ids
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import BaseModel, ConfigDict

from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.provenance import Order, RouteOrigin, RouteProvenance, RowGroup
from moe_replay.archive.reading import Artifact
from moe_replay.archive.route_arrays import codec_name, corrupt, open_arrays, open_provenance, read_part
from moe_replay.archive.route_writing import RoutedSequence, token_digest, write_routes
from moe_replay.errors import ReplayError, RoutingMismatch
from moe_replay.routing.trace import RouteIds, RoutingTrace

__all__ = [
    "RouteArchive",
    "RouteOrigin",
    "RouteProvenance",
    "RouteSummary",
    "RoutedSequence",
    "RowGroup",
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
    padded_rows: int
    codec: str
    """What compresses the routes: `expert-set` or `zstd`."""
    order: Order
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
        arrays = open_arrays(artifact, group, provenance)
        self._ids, self._valid = arrays["ids"], arrays["valid"]
        self._offsets: npt.NDArray[np.int64] = read_part(artifact, arrays["offsets"], slice(None))
        self._digests: npt.NDArray[np.uint8] = read_part(artifact, arrays["token_digests"], slice(None))
        self._group_starts = [group.first_token for group in provenance.row_groups]
        self._check_offsets()

    @classmethod
    def open(cls, artifact: Artifact) -> "RouteArchive":
        """Open and check everything but the routes themselves.

        Raises ArchiveCorrupt when an object is damaged, or the archive is of another run, iteration or shape.
        """
        return cls(artifact, *open_provenance(artifact))

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

    def sequence_tokens(self, start: int, stop: int) -> list[slice]:
        """The token range of each of the sequences start..stop-1."""
        _whole_range(slice(start, stop), self.num_sequences, "sequences")
        return [slice(int(a), int(b)) for a, b in pairwise(self._offsets[start : stop + 1])]

    def origins_of(self, tokens: slice) -> list[tuple[slice, RouteOrigin]]:
        """Where a token range comes from: its parts by origin, in order."""
        rows, parts = _whole_range(tokens, self.num_tokens, "tokens"), []
        for group in self._groups_from(bisect_right(self._group_starts, rows.start) - 1, rows):
            start, stop = max(rows.start, group.first_token), min(rows.stop, group.first_token + group.tokens)
            origin = self.provenance.origins[group.origin]
            if parts and parts[-1][1] == origin:
                start = parts.pop()[0].start
            parts.append((slice(start, stop), origin))
        return parts

    def read(self, tokens: slice, layers: slice | None = None) -> RoutingTrace:
        """The routes of a token range and a range of MoE layers (positions in `layers`, not decoder indices).

        Reads only the chunks that hold them. Raises ArchiveCorrupt when one of these is damaged or not what the
        provenance says, RoutingMismatch when the range leaves the archive or what it holds is no routing.
        """
        rows = _whole_range(tokens, self.num_tokens, "tokens")
        columns = _whole_range(layers or slice(None), len(self.layers), "MoE layers")
        if rows.start == rows.stop:
            ids_LTK = np.zeros((columns.stop - columns.start, 0, self.provenance.top_k), self._ids.dtype)
            valid_T = np.zeros(0, dtype=np.bool_)
        else:
            ids_LTK = read_part(self.artifact, self._ids, (columns, rows, slice(None)))
            valid_T = read_part(self.artifact, self._valid, rows)
        ids_TLK = np.ascontiguousarray(ids_LTK.transpose(1, 0, 2))
        trace = RoutingTrace(ids_TLK, valid_T, self.provenance.num_experts, self.layers[columns])
        self._check_counts(rows, valid_T)
        if self.provenance.order == "ascending" and not _ascends(ids_TLK, valid_T):
            raise corrupt(self.artifact, f"tokens {rows.start} to {rows.stop - 1} do not name experts by ascending id")
        return trace

    def read_sequences(self, start: int, stop: int, layers: slice | None = None) -> list[RoutingTrace]:
        """The traces of sequences start..stop-1; reads and raises as `read` does."""
        parts = self.sequence_tokens(start, stop)
        if not parts:
            return []
        first = parts[0].start
        together = self.read(slice(first, parts[-1].stop), layers)
        return [together.slice_tokens(part.start - first, part.stop - first) for part in parts]

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

    def require_rollout(self, rollout: ArtifactRef) -> None:
        """Raise RoutingMismatch unless the archive was made from this rollout."""
        found = self.artifact.commit.inputs.get("rollout")
        if found != rollout:
            told = "no rollout" if found is None else f"rollout {found.uri} (sha256 {found.sha256})"
            raise RoutingMismatch(
                f"{self.artifact.name} holds routes of {told}, expected those of {rollout.uri} (sha256 "
                f"{rollout.sha256}): archive the rollout's own routes"
            )

    def require_model(self, num_experts: int, top_k: int, layers: tuple[int, ...]) -> slice:
        """Where a model's decoder layers stand in the archive: all of them, or those of one stage of a pipeline.

        Raises RoutingMismatch unless it holds them one after the other, of that many experts and that top-k.
        """
        found, expected = self.provenance.origins[0].model, (num_experts, top_k, layers)
        start = self.layers.index(layers[0]) if layers and layers[0] in self.layers else 0
        positions = slice(start, start + len(layers))
        if (*found[:2], self.layers[positions]) != expected or not layers:
            raise RoutingMismatch(
                f"{self.artifact.name} holds routes of a model with (experts, top_k, layers) = {found}, expected "
                f"{expected}; they are of another model or layer map: capture routes with this model"
            )
        return positions

    def summary(self) -> RouteSummary:
        """Counts and sizes, without reading routes."""
        commit, provenance = self.artifact.commit, self.provenance
        size = commit.num_bytes + len(commit.to_bytes())
        return RouteSummary(
            tokens=self.num_tokens,
            sequences=self.num_sequences,
            layers=len(self.layers),
            experts=provenance.num_experts,
            top_k=provenance.top_k,
            captured_rows=provenance.captured_rows,
            missing_rows=provenance.missing_rows,
            padded_rows=provenance.padded_rows,
            codec=codec_name(self._ids),
            order=provenance.order,
            bytes=size,
            bytes_per_token=size / self.num_tokens if self.num_tokens else 0.0,
            provenance=provenance,
        )

    def chunks(self) -> Iterator[slice]:
        """Token ranges that together cover the archive, each one chunk: read in these, it takes bounded memory."""
        step = self._ids.chunks[1]
        for start in range(0, self.num_tokens, step):
            yield slice(start, min(start + step, self.num_tokens))

    def _check_offsets(self) -> None:
        num_tokens, steps = self.provenance.tokens, np.diff(self._offsets)
        if self._offsets[0] != 0 or self._offsets[-1] != num_tokens or (steps < 0).any():
            raise corrupt(
                self.artifact,
                f"offsets must rise from 0 to {num_tokens}; they go from {self._offsets[0]} to {self._offsets[-1]} "
                f"with a smallest step of {steps.min(initial=0)}",
            )

    def _check_counts(self, rows: slice, valid_T: npt.NDArray[np.bool_]) -> None:
        """Of the row groups that lie in `rows` whole."""
        for group in self._groups_from(bisect_left(self._group_starts, rows.start), rows):
            start = group.first_token - rows.start
            captured = int(valid_T[start : start + group.tokens].sum())
            if captured != group.captured_rows and group.first_token + group.tokens <= rows.stop:
                raise corrupt(
                    self.artifact,
                    f"{captured} of {group.tokens} rows from token {group.first_token} on are valid, its provenance "
                    f"says {group.captured_rows} were captured",
                )

    def _groups_from(self, first: int, rows: slice) -> Sequence[RowGroup]:
        """Row groups number `first` on that begin before the end of `rows`; none for an empty range."""
        last = bisect_left(self._group_starts, rows.stop) if rows.start < rows.stop else 0
        return self.provenance.row_groups[max(first, 0) : last]


def verify_routes(artifact: Artifact) -> list[str]:
    """Re-read every object and every route, a chunk of tokens at a time; what is wrong, one line each."""
    problems = artifact.problems()
    if problems:
        return problems
    try:
        archive = RouteArchive.open(artifact)
        for rows in archive.chunks():
            archive.read(rows)
    except ReplayError as error:
        return [f"{artifact.name}: {error}"]
    return []


def _ascends(ids_TLK: RouteIds, valid_T: npt.NDArray[np.bool_]) -> bool:
    """Whether each valid row names its experts by ascending id."""
    flat, top_k = ids_TLK.reshape(-1), ids_TLK.shape[-1]
    # Comparing the array with itself moved by one is far faster than comparing short rows.
    rises = np.ones(flat.shape, dtype=np.bool_)
    np.greater(flat[1:], flat[:-1], out=rises[1:])
    rises[::top_k] = True
    return bool((rises.reshape(len(valid_T), -1).all(axis=1) | ~valid_T).all()) if len(valid_T) else True


def _whole_range(part: slice, size: int, name: str) -> slice:
    start, stop = 0 if part.start is None else part.start, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise RoutingMismatch(
            f"{name} {start}:{stop} (step {part.step}) is no range of the archive's {size} {name}; "
            "read a range inside it"
        )
    return slice(start, stop)
