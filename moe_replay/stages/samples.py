"""The samples of a rollout in Parquet: tokens, log-probs and rewards, and beside them the routes as captured.

Raw routes are kept with the rollout so that a crash before archiving does not lose them: on a GPU the same sampling
can't be repeated. They lie in objects of their own, which training, that reads the archive, never fetches.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, zip_longest
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_replay.archive.artifacts import Artifact, StageWriter
from moe_replay.archive.route_writing import DIGEST_BYTES
from moe_replay.archive.routes import RouteOrigin, token_digest
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace, route_dtype

PART_ROWS, PART_BYTES = 1024, 64 << 20
"""Samples in one object at most, and bytes that they take in memory, with which it is full."""
_ITEM_BYTES = 32
"""What Python takes for a token id or log-prob in a list."""

_ANSWERS, _CAPTURED = "part", "captured"

SCHEMA = pa.schema(
    {
        "sequence_id": pa.int64(),
        "prompt_row": pa.int64(),
        "group": pa.int64(),
        "data_source": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float32()),
        "text": pa.string(),
        "reward": pa.float64(),
        "truncated": pa.bool_(),
        "token_digest": pa.binary(DIGEST_BYTES),
    }
)
PARTIAL_SCHEMA = SCHEMA.append(pa.field("weight_versions", pa.list_(pa.int32())))
"""Of partial rollouts, whose tokens were not all sampled under the same weights."""
CAPTURE_SCHEMA = pa.schema({"sequence_id": pa.int64(), "routed_experts": pa.binary(), "routed": pa.binary()})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response to one prompt."""

    sequence_id: int
    """Position in the rollout batch."""
    prompt_row: int
    """Row of the prompt in the data."""
    group: int
    """Responses of one group answer the same prompt; GRPO normalises rewards within it."""
    data_source: str
    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float]
    text: str
    reward: float
    truncated: bool
    weight_versions: list[int] | None = None
    """The iteration that trains the policy which sampled each response token; none where all are the rollout's own."""

    def __post_init__(self) -> None:
        if self.weight_versions is not None and len(self.weight_versions) != len(self.response_ids):
            raise RoutingMismatch(
                f"sequence {self.sequence_id} has {len(self.response_ids)} response tokens and "
                f"{len(self.weight_versions)} weight versions; they belong to other tokens: run the rollout again"
            )
        if len(self.log_probs) != len(self.response_ids):
            raise RoutingMismatch(
                f"sequence {self.sequence_id} has {len(self.response_ids)} response tokens and {len(self.log_probs)} "
                "log-probs; they belong to other tokens: run the rollout again"
            )

    @property
    def token_digest(self) -> bytes:
        """Digest of prompt and response."""
        return token_digest([*self.prompt_ids, *self.response_ids])


AnAnswer = TypeVar("AnAnswer", bound=Answer)


@dataclass(frozen=True, kw_only=True)
class Sample(Answer):
    """One response to one prompt, and the routes that served it."""

    trace: RoutingTrace

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = len(self.prompt_ids) + len(self.response_ids)
        if self.trace.num_tokens != tokens:
            raise RoutingMismatch(
                f"sequence {self.sequence_id} has {tokens} tokens but routes of {self.trace.num_tokens} rows; they "
                "belong to other tokens: re-run the rollout, routes are never padded"
            )


def write_samples(writer: StageWriter, samples: Sequence[Sample]) -> None:
    """Write `part-*.parquet`, and the routes in `captured-*.parquet`, by `write_parts`.

    All samples have weight versions, or none.
    """
    schema = PARTIAL_SCHEMA if any(sample.weight_versions for sample in samples) else SCHEMA
    write_parts(writer, _ANSWERS, ({name: getattr(one, name) for name in schema.names} for one in samples), schema)
    captured = ({"sequence_id": sample.sequence_id, **columns_of(sample.trace)} for sample in samples)
    write_parts(writer, _CAPTURED, captured, CAPTURE_SCHEMA)


def write_parts(writer: StageWriter, kind: str, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows to `<kind>-*.parquet`: up to `PART_ROWS` each, fewer where these take `PART_BYTES` and more."""
    left = iter(rows)
    for part in count():
        held = list(_one_part(left))
        if not held:
            break
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(held, schema), buffer, compression="zstd")
        writer.write_bytes(f"{kind}-{part:05d}.parquet", buffer.getvalue())


def _one_part(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    num_rows, num_bytes = 0, 0
    while num_rows < PART_ROWS and num_bytes < PART_BYTES and (row := next(rows, None)) is not None:
        num_rows += 1
        num_bytes += sum(_bytes_of(cell) for cell in row.values())
        yield row


def _bytes_of(cell: Any) -> int:
    """About what a cell takes in memory; nothing where that is little."""
    if isinstance(cell, list):
        return _ITEM_BYTES * len(cell)
    return len(cell) if isinstance(cell, (bytes, str)) else 0


def read_answers(artifact: Artifact) -> Iterator[Answer]:
    """The samples of a rollout, in order, without their routes; raises as `read_samples` does."""
    for row in read_parts(artifact, _ANSWERS, PARTIAL_SCHEMA):
        yield _checked(Answer(**_without_digest(row)), row["token_digest"])


def read_samples(artifact: Artifact) -> Iterator[Sample]:
    """The samples of a rollout, in order, verified against the commit.

    Raises:
        ArchiveCorrupt: an object is not as committed.
        RoutingMismatch: a sample's tokens are not those its routes were captured for.
    """
    origin = route_origin(artifact)
    parts = read_parts(artifact, _ANSWERS, PARTIAL_SCHEMA), read_parts(artifact, _CAPTURED, CAPTURE_SCHEMA)
    for row, routes in zip_longest(*parts):
        told, routed = (f"sequence {one['sequence_id']}" if one else "none" for one in (row, routes))
        if told != routed:
            raise RoutingMismatch(
                f"{artifact.name} has routes of {routed} where it has tokens of {told}; the rollout was altered: run "
                "it again"
            )
        trace = trace_of(routes, origin, told)
        sample = Sample(**_without_digest(row), trace=trace)
        yield _checked(sample, row["token_digest"])


def route_origin(artifact: Artifact) -> RouteOrigin:
    """Which engine, weights and model shape a rollout's routes come from, as its commit says."""
    return RouteOrigin.model_validate(artifact.commit.attributes)


def read_parts(artifact: Artifact, kind: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The rows of `<kind>-*.parquet`, in order; columns that a file lacks are none. Raises as `Artifact.read_bytes`."""
    for path in _parts(artifact, kind):
        yield from _read(artifact, path, schema)


def columns_of(trace: RoutingTrace) -> dict[str, bytes]:
    """A trace as cells of Parquet."""
    return {"routed_experts": trace.ids_TLK.tobytes(), "routed": trace.valid_T.tobytes()}


def trace_of(row: dict[str, Any], origin: RouteOrigin, name: str) -> RoutingTrace:
    """The trace in the cells of a row; raises RoutingMismatch with its `name` unless it is of the origin's model."""
    dtype = np.dtype(route_dtype(origin.num_experts))
    valid_T = np.frombuffer(row["routed"], dtype=np.bool_)
    shape = (len(valid_T), len(origin.layers), origin.top_k)
    if len(row["routed_experts"]) != math.prod(shape) * dtype.itemsize:
        raise RoutingMismatch(
            f"{name} has {len(row['routed_experts'])} bytes of routes, {dtype} of shape {shape} takes "
            f"{math.prod(shape) * dtype.itemsize}; they are of another model: run the rollout again"
        )
    ids_TLK = np.frombuffer(row["routed_experts"], dtype=dtype).reshape(shape)
    return RoutingTrace(ids_TLK, valid_T, origin.num_experts, origin.layers)


def _parts(artifact: Artifact, kind: str) -> list[str]:
    return [stored.path for stored in artifact.commit.objects if stored.path.startswith(f"{kind}-")]


def _read(artifact: Artifact, path: str, schema: pa.Schema) -> list[dict[str, Any]]:
    # In this thread alone: a part is small, and to wake pyarrow's threads takes longer than to read it.
    source = pa.BufferReader(artifact.read_bytes(path))
    return pq.read_table(source, schema=schema, use_threads=False, pre_buffer=False).to_pylist()


def _without_digest(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "token_digest"}


def _checked(answer: AnAnswer, expected: bytes) -> AnAnswer:
    """The answer, unless its tokens are not those that the rollout wrote."""
    if answer.token_digest != expected:
        raise RoutingMismatch(
            f"sequence {answer.sequence_id} has tokens of digest {answer.token_digest.hex()}, its routes were captured "
            f"for {expected.hex()}; the rollout was altered: run it again"
        )
    return answer
