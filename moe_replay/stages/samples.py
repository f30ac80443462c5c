"""The samples of a rollout in Parquet: tokens, log-probs, rewards, and the routes as the engine captured them.

Raw routes are kept beside their tokens so that a crash between rollout and archiving loses neither: on a GPU the same
sampling can't be repeated.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_replay.archive.artifacts import Artifact, StageWriter
from moe_replay.archive.routes import RouteOrigin, token_digest
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace, route_dtype

PART_ROWS = 64
"""Samples in one object: what reading holds in memory at a time."""

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
        "token_digest": pa.binary(16),
        "routed_experts": pa.binary(),
        "routed": pa.binary(),
    }
)


@dataclass(frozen=True)
class Sample:
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
    trace: RoutingTrace

    def __post_init__(self) -> None:
        tokens, responses = len(self.prompt_ids) + len(self.response_ids), len(self.response_ids)
        if self.trace.num_tokens != tokens or len(self.log_probs) != responses:
            raise RoutingMismatch(
                f"sequence {self.sequence_id} has {tokens} tokens, {responses} of them of the response, but routes of "
                f"{self.trace.num_tokens} rows and {len(self.log_probs)} log-probs; they belong to other tokens: "
                "re-run the rollout, routes are never padded"
            )

    @property
    def token_digest(self) -> bytes:
        """Digest of prompt and response."""
        return token_digest([*self.prompt_ids, *self.response_ids])


def write_samples(writer: StageWriter, samples: Sequence[Sample]) -> None:
    """Write `part-*.parquet`; one schema, `PART_ROWS` samples a part."""
    for part, start in enumerate(range(0, len(samples), PART_ROWS)):
        rows = [_to_row(sample) for sample in samples[start : start + PART_ROWS]]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
        writer.write_bytes(f"part-{part:05d}.parquet", buffer.getvalue())


def read_samples(artifact: Artifact) -> Iterator[Sample]:
    """The samples of a rollout, in order, verified against the commit.

    Raises:
        ArchiveCorrupt: an object is not as committed.
        RoutingMismatch: a sample's tokens are not those its routes were captured for.
    """
    origin = route_origin(artifact)
    for stored in artifact.commit.objects:
        table = pq.read_table(io.BytesIO(artifact.read_bytes(stored.path)), schema=SCHEMA)
        for row in table.to_pylist():
            yield _from_row(row, origin)


def route_origin(artifact: Artifact) -> RouteOrigin:
    """Which engine, weights and model shape a rollout's routes come from, as its commit says."""
    return RouteOrigin.model_validate(artifact.commit.attributes)


def _to_row(sample: Sample) -> dict:
    row = {name: getattr(sample, name) for name in SCHEMA.names if name not in ("routed_experts", "routed")}
    row["routed_experts"] = sample.trace.ids_TLK.tobytes()
    row["routed"] = sample.trace.valid_T.tobytes()
    return row


def _from_row(row: dict, origin: RouteOrigin) -> Sample:
    routed, dtype = row.pop("routed_experts"), np.dtype(route_dtype(origin.num_experts))
    valid_T = np.frombuffer(row.pop("routed"), dtype=np.bool_)
    expected = row.pop("token_digest")
    shape = (len(valid_T), len(origin.layers), origin.top_k)
    if len(routed) != math.prod(shape) * dtype.itemsize:
        raise RoutingMismatch(
            f"sequence {row['sequence_id']} has {len(routed)} bytes of routes, {dtype} of shape {shape} takes "
            f"{math.prod(shape) * dtype.itemsize}; they are of another model: run the rollout again"
        )
    ids_TLK = np.frombuffer(routed, dtype=dtype).reshape(shape)
    trace = RoutingTrace(ids_TLK, valid_T, origin.num_experts, origin.layers)
    sample = Sample(**row, trace=trace)
    if sample.token_digest != expected:
        raise RoutingMismatch(
            f"sequence {sample.sequence_id} has tokens of digest {sample.token_digest.hex()}, its routes were captured "
            f"for {expected.hex()}; the rollout was altered: run it again"
        )
    return sample
