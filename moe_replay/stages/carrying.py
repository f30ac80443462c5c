"""Responses that a rollout leaves unfinished and the next one goes on with: what of them is stored, and where from.

Beside the samples of a partial rollout lie `carried-*.parquet`, a row a response, and `partial.json`, which tells where
tokens of each weight version come from. Weight version v is the policy that iteration v trains; it rolls out
under the same, or with one_step_off under the one before.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from moe_replay.archive.artifacts import Artifact, StageWriter
from moe_replay.archive.route_writing import DIGEST_BYTES
from moe_replay.archive.routes import RoutedSequence, RouteOrigin, token_digest
from moe_replay.data.prompts import PromptTable
from moe_replay.engines.rollout import Response
from moe_replay.errors import RoutingMismatch
from moe_replay.stages.prompt_groups import Begun, PromptGroup
from moe_replay.stages.samples import columns_of, read_parts, read_samples, route_origin, trace_of, write_parts

_CARRIED, _ABOUT_FILE = "carried", "partial.json"
_SCHEMA = pa.schema(
    {
        "drawn": pa.int64(),
        "prompt_row": pa.int64(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float32()),
        "weight_versions": pa.list_(pa.int32()),
        "text": pa.string(),
        "truncated": pa.bool_(),
        "finished": pa.bool_(),
        "token_digest": pa.binary(DIGEST_BYTES),
        "routed_experts": pa.binary(),
        "routed": pa.binary(),
    }
)


class PartialAbout(BaseModel):
    """What a partial rollout says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts_drawn: int
    """Of the run's endless order of prompts, up to and with this rollout: where the next one reads on."""
    data_sha256: str
    """Of the file that they are rows of."""
    origins: dict[int, RouteOrigin]
    """By weight version, of all versions that its tokens have."""


def write_carried(writer: StageWriter, groups: Sequence[PromptGroup], about: PartialAbout) -> None:
    """Write groups of which every response is begun, and what is to be known of the whole rollout."""
    rows = (_row(group, member) for group in groups for member in group.begun)
    write_parts(writer, _CARRIED, rows, _SCHEMA)
    writer.write_bytes(_ABOUT_FILE, about.model_dump_json(indent=2).encode())


def read_carried(artifact: Artifact, table: PromptTable) -> list[PromptGroup]:
    """The groups that a rollout left to the next, in their order.

    Raises:
        ArchiveCorrupt: an object is not as committed.
        RoutingMismatch: tokens are not those that the routes were captured for, or of another model.
    """
    origin, groups = route_origin(artifact), []
    for drawn, rows in groupby(read_parts(artifact, _CARRIED, _SCHEMA), lambda row: row["drawn"]):
        held = list(rows)
        [prompt] = table.at([held[0]["prompt_row"]])
        groups.append(PromptGroup(drawn, prompt, [_begun(row, origin) for row in held]))
    return groups


def read_about(artifact: Artifact) -> PartialAbout | None:
    """What a rollout says of itself, none where it is not partial; raises as `Artifact.read_bytes`."""
    if not any(stored.path == _ABOUT_FILE for stored in artifact.commit.objects):
        return None
    return PartialAbout.model_validate_json(artifact.read_bytes(_ABOUT_FILE))


def routed_sequences(artifact: Artifact) -> Iterator[RoutedSequence]:
    """The routes of a rollout's samples as they are archived; raises as `read_samples`."""
    about = read_about(artifact)
    origins = about.origins if about else {}
    for sample in read_samples(artifact):
        changes = route_changes(len(sample.prompt_ids), sample.weight_versions or [])
        parts = tuple((first, origins[version]) for first, version in changes)
        yield RoutedSequence(sample.trace, sample.token_digest, parts)


def route_changes(prompt_tokens: int, weight_versions: Sequence[int]) -> list[tuple[int, int]]:
    """(First row, weight version) wherever the weights change that a sequence was routed under.

    A token is fed, and with that routed, when the one after it is sampled. So the last token before a change has its
    route of the weights after it, and the prompt has those of the first response token.
    """
    changes = [(0, weight_versions[0])] if weight_versions else []
    for i, (before, version) in enumerate(pairwise(weight_versions), start=1):
        if version != before:
            changes.append((prompt_tokens + i - 1, version))
    return changes


def _row(group: PromptGroup, member: Begun) -> dict[str, Any]:
    response = member.response
    return {
        "drawn": group.drawn,
        "prompt_row": group.prompt.row,
        "prompt_ids": response.prompt_ids,
        "response_ids": response.response_ids,
        "log_probs": response.log_probs,
        "weight_versions": member.weight_versions,
        "text": response.text,
        "truncated": response.truncated,
        "finished": member.finished,
        "token_digest": token_digest([*response.prompt_ids, *response.response_ids]),
        **columns_of(response.trace),
    }


def _begun(row: dict[str, Any], origin: RouteOrigin) -> Begun:
    name = f"a carried response to prompt {row['prompt_row']}"
    found, trace = token_digest([*row["prompt_ids"], *row["response_ids"]]), trace_of(row, origin, name)
    lengths = {len(row["response_ids"]), len(row["log_probs"]), len(row["weight_versions"])}
    if found != row["token_digest"] or lengths != {trace.num_tokens - len(row["prompt_ids"])}:
        raise RoutingMismatch(
            f"{name} has tokens of digest {found.hex()}, its {trace.num_tokens} rows of routes were captured for "
            f"{row['token_digest'].hex()}; the rollout was altered: run it again"
        )
    told = {name: row[name] for name in ("prompt_ids", "response_ids", "log_probs", "text", "truncated")}
    return Begun(Response(**told, trace=trace), row["weight_versions"], row["finished"])
