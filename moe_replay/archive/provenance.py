"""Where routes come from: for a whole archive, and for each row group, which never mixes origins."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Order = Literal["ascending", "engine"]
"""How the experts of a row are stored: by id, or as the engine named them."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RouteOrigin(_Record):
    """Where routes come from: the engine, the weights they were routed under, the model's shape."""

    source: str
    """Who chose the experts, e.g. `vllm`, or `old_log_prob` for the trainer's own pass."""
    engine_version: str
    dtype: str
    """What the engine computed in, e.g. `bfloat16`."""
    weights_sha256: Sha256 | None
    """The artifact or model whose weights the engine held; None for imported routes that don't say."""
    gates_sha256: Sha256 | None = None
    """The router weights the engine loaded, as `moe_replay.engines.gates` hashes them; None when not known."""
    predictor_sha256: Sha256 | None = None
    """The predictor merged into the gates; None for none."""
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    num_experts: int = Field(ge=1, le=65536)
    top_k: int = Field(ge=1)

    @property
    def model(self) -> tuple[int, int, tuple[int, ...]]:
        """(experts, top_k, layers)."""
        return self.num_experts, self.top_k, self.layers


class RowGroup(_Record):
    """Consecutive tokens of one origin, within one chunk."""

    first_token: int = Field(ge=0)
    tokens: int = Field(ge=1)
    captured_rows: int = Field(ge=0)
    missing_rows: int = Field(ge=0)
    padded_rows: int = Field(ge=0)
    """Rows of padding that the source held beside these tokens and that were left out."""
    origin: int = Field(ge=0)
    """Index into the archive's origins."""

    @model_validator(mode="after")
    def _counts_every_token(self) -> "RowGroup":
        if self.captured_rows + self.missing_rows != self.tokens:
            raise ValueError(
                f"{self.captured_rows} captured and {self.missing_rows} missing rows are not {self.tokens} tokens"
            )
        return self


class GroupProvenance(_Record):
    """Where any zarr group of an artifact belongs."""

    run_id: str
    iteration: int = Field(ge=0)


class RouteProvenance(GroupProvenance):
    """Where the routes of one archive come from, and of how many tokens they are."""

    order: Order
    origins: tuple[RouteOrigin, ...] = Field(min_length=1)
    """Each once; all of one model's shape."""
    row_groups: tuple[RowGroup, ...]
    """They cover the archive's tokens, one after the other."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "RouteProvenance":
        if len(set(self.origins)) < len(self.origins) or len({origin.model for origin in self.origins}) > 1:
            raise ValueError(f"the {len(self.origins)} origins must differ, and have one (experts, top_k, layers)")
        starts = [0, *accumulate(group.tokens for group in self.row_groups)]
        for i, (group, start) in enumerate(zip(self.row_groups, starts, strict=False)):
            if group.first_token != start or group.origin >= len(self.origins):
                raise ValueError(
                    f"row group {i} starts at token {group.first_token} and is of origin {group.origin}; expected "
                    f"token {start} and one of {len(self.origins)} origins"
                )
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layer index of each MoE layer, ascending."""
        return self.origins[0].layers

    @property
    def num_experts(self) -> int:
        """E."""
        return self.origins[0].num_experts

    @property
    def top_k(self) -> int:
        """K."""
        return self.origins[0].top_k

    @property
    def tokens(self) -> int:
        """T, missing rows included."""
        return self.captured_rows + self.missing_rows

    @property
    def captured_rows(self) -> int:
        """Tokens with routes."""
        return sum(group.captured_rows for group in self.row_groups)

    @property
    def missing_rows(self) -> int:
        """Tokens whose routes were not captured."""
        return sum(group.missing_rows for group in self.row_groups)

    @property
    def padded_rows(self) -> int:
        """Rows of padding left out."""
        return sum(group.padded_rows for group in self.row_groups)


@dataclass
class _OpenGroup:
    first_token: int
    origin: int
    tokens: int = 0
    captured: int = 0
    padded: int = 0

    def close(self) -> RowGroup:
        return RowGroup(
            first_token=self.first_token,
            tokens=self.tokens,
            captured_rows=self.captured,
            missing_rows=self.tokens - self.captured,
            padded_rows=self.padded,
            origin=self.origin,
        )


class RowGroupCounter:
    """Makes row groups of tokens as they come in: one ends where the origin changes and where a chunk does."""

    def __init__(self, chunk_tokens: int) -> None:
        self.origins: dict[RouteOrigin, int] = {}
        self.num_tokens = 0
        self._chunk_tokens = chunk_tokens
        self._groups: list[_OpenGroup] = []

    def add(self, valid_T: npt.NDArray[np.bool_], origin: RouteOrigin) -> None:
        """Count T more tokens, of one origin."""
        index = self.origins.setdefault(origin, len(self.origins))
        done = 0
        while done < len(valid_T):
            room = self._chunk_tokens - self.num_tokens % self._chunk_tokens
            part = valid_T[done : done + room]
            group = self._group_for(index)
            group.tokens += len(part)
            group.captured += int(part.sum())
            self.num_tokens += len(part)
            done += len(part)

    def add_padding(self, rows: int) -> None:
        """Note rows of padding left out beside the tokens added last."""
        if rows:
            self._groups[-1].padded += rows

    def close(self) -> tuple[RowGroup, ...]:
        """The row groups of all tokens added."""
        return tuple(group.close() for group in self._groups)

    def _group_for(self, origin: int) -> _OpenGroup:
        starts_chunk = self.num_tokens % self._chunk_tokens == 0
        if starts_chunk or self._groups[-1].origin != origin:
            self._groups.append(_OpenGroup(self.num_tokens, origin))
        return self._groups[-1]
