"""The samples of a rollout in Parquet: tokens, log-probs and rewards, and beside them the routes as captured.

Raw routes are kept with the rollout so that a crash before archiving does not lose them: on a GPU the same sampling
can't be repeated. They lie in objects of their own, which training, that reads the archive, never fetches.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_replay.archive.artifacts import Artifact, StageWriter
from moe_replay.archive.route_writing import DIGEST_BYTES
from moe_replay.archive.routes import RouteOrigin, token_digest
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import RoutingTrace, route_dtype

PART_ROWS = 64
"""Samples in one object: what reading holds in memory at a time."""

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

    def __post_init__(self) -> None:
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
    """Write `part-*.parquet` and the routes in `captured-*.parquet`, `PART_ROWS` samples each."""
    for part, start in enumerate(range(0, len(samples), PART_ROWS)):
        held = samples[start : start + PART_ROWS]
        answers = [{name: getattr(sample, name) for name in SCHEMA.names} for sample in held]
        _write(writer, f"{_ANSWERS}-{part:05d}.parquet", pa.Table.from_pylist(answers, SCHEMA))
        captured = [_captured(sample) for sample in held]
        _write(writer, f"{_CAPTURED}-{part:05d}.parquet", pa.Table.from_pylist(captured, CAPTURE_SCHEMA))


def read_answers(artifact: Artifact) -> Iterator[Answer]:
    """The samples of a rollout, in order, without their routes; raises as `read_samples` does."""
    for path in _parts(artifact, _ANSWERS):
        for row in _read(artifact, path, SCHEMA):
            yield _checked(Answer(**_without_digest(row)), row["token_digest"])


def read_samples(artifact: Artifact) -> Iterator[Sample]:
    """The samples of a rollout, in order, verified against the commit.

    Raises:
        ArchiveCorrupt: an object is not as committed.
        RoutingMismatch: a sample's tokens are not those its routes were captured for.
    """
    origin = route_origin(artifact)
    for answers, captured in zip(_parts(artifact, _ANSWERS), _parts(artifact, _CAPTURED), strict=True):
        rows = zip(_read(artifact, answers, SCHEMA), _read(artifact, captured, CAPTURE_SCHEMA), strict=True)
        for row, routes in rows:
            if row["sequence_id"] != routes["sequence_id"]:
                raise RoutingMismatch(
                    f"{artifact.name}/{captured} has routes of sequence {routes['sequence_id']} where {answers} has "
                    f"sequence {row['sequence_id']}; the rollout was altered: run it again"
                )
            sample = Sample(**_without_digest(row), trace=_trace(routes, origin))
            yield _checked(sample, row["token_digest"])


def route_origin(artifact: Artifact) -> RouteOrigin:
    """Which engine, weights and model shape a rollout's routes come from, as its commit says."""
    return RouteOrigin.model_validate(artifact.commit.attributes)


def _parts(artifact: Artifact, kind: str) -> list[str]:
    return [stored.path for stored in artifact.commit.objects if stored.path.startswith(f"{kind}-")]


def _write(writer: StageWriter, path: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    writer.write_bytes(path, buffer.getvalue())


def _read(artifact: Artifact, path: str, schema: pa.Schema) -> list[dict]:
    return pq.read_table(io.BytesIO(artifact.read_bytes(path)), schema=schema).to_pylist()


def _captured(sample: Sample) -> dict:
    routed_experts, routed = sample.trace.ids_TLK.tobytes(), sample.trace.valid_T.tobytes()
    return {"sequence_id": sample.sequence_id, "routed_experts": routed_experts, "routed": routed}


def _trace(row: dict, origin: RouteOrigin) -> RoutingTrace:
    dtype = np.dtype(route_dtype(origin.num_experts))
    valid_T = np.frombuffer(row["routed"], dtype=np.bool_)
    shape = (len(valid_T), len(origin.layers), origin.top_k)
    if len(row["routed_experts"]) != math.prod(shape) * dtype.itemsize:
        raise RoutingMismatch(
            f"sequence {row['sequence_id']} has {len(row['routed_experts'])} bytes of routes, {dtype} of shape {shape} "
            f"takes {math.prod(shape) * dtype.itemsize}; they are of another model: run the rollout again"
        )
    ids_TLK = np.frombuffer(row["routed_experts"], dtype=dtype).reshape(shape)
    return RoutingTrace(ids_TLK, valid_T, origin.num_experts, origin.layers)


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
