"""Writing router evolution as training goes, in the memory of one mini-step's sample.

`docs/archive-format.md` says what the group holds. Legend: S sampled tokens of one mini-step, L MoE layers, H hidden
size, E experts.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_replay.archive.provenance import GroupProvenance, Sha256
from moe_replay.archive.writing import StageWriter
from moe_replay.archive.zarr_groups import GroupFormat, create_array
from moe_replay.errors import RoutingMismatch
from moe_replay.routing.trace import check_layers

FORMAT = GroupFormat("router evolution", "samples", "training", "evolution", "moe-replay-evolution", 1)

HiddenDtype = Literal["float32", "bfloat16"]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class EvolutionOrigin(BaseModel):
    """Whose routers evolved: the policy of the old log-prob pass, the model's shape, the steps it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_sha256: Sha256
    """The policy that the old log-prob pass scored with."""
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    num_experts: int = Field(ge=1, le=65536)
    top_k: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    mini_steps: int = Field(ge=1, le=65535)
    """κ, optimizer steps of the iteration."""

    @field_validator("layers")
    @classmethod
    def _is_a_layer_map(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        check_layers(layers)
        return layers

    @model_validator(mode="after")
    def _routes_to_experts_it_has(self) -> "EvolutionOrigin":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} of {self.num_experts} experts; expected 1 to {self.num_experts}")
        return self


class EvolutionProvenance(GroupProvenance):
    """Where the samples of one group come from, and how many there are."""

    origin: EvolutionOrigin
    sampled_steps: tuple[int, ...] = Field(min_length=1)
    """Mini-steps that tokens were sampled of, ascending, counted from 1; the samples lie in their order."""
    rows_per_step: int = Field(ge=1)
    """Sampled tokens of each of these mini-steps."""
    dtype: HiddenDtype
    """Precision of the hidden states kept; bfloat16 is stored as its 16 bits."""

    @model_validator(mode="after")
    def _samples_steps_there_were(self) -> "EvolutionProvenance":
        steps, last = self.sampled_steps, self.origin.mini_steps
        if steps[0] < 1 or steps[-1] > last or any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"sampled mini-steps {steps} are not ascending, each once, of 1 to {last}")
        return self

    @property
    def tokens(self) -> int:
        """Sampled tokens of all mini-steps."""
        return self.rows_per_step * len(self.sampled_steps)


class EvolutionWriter:
    """Writes what each sampled mini-step brings straight through, so nothing but one step's rows is in memory.

    Steps come in any order, before and after apart; `close` finishes the group, which is nothing without it.
    """

    def __init__(
        self,
        writer: StageWriter,
        origin: EvolutionOrigin,
        rows_per_step: int,
        sampled_steps: tuple[int, ...],
        dtype: HiddenDtype,
    ) -> None:
        """Begin the group; raises ValueError (pydantic's) unless the steps are ones that `origin` takes."""
        self._provenance = EvolutionProvenance(
            run_id=writer.key.run_id,
            iteration=writer.key.iteration,
            origin=origin,
            sampled_steps=sampled_steps,
            rows_per_step=rows_per_step,
            dtype=dtype,
        )
        store = writer.zarr_store(FORMAT.group)
        self._group = zarr.create_group(store, zarr_format=3)
        shapes = array_shapes(self._provenance)
        self._arrays = {
            name: create_array(store, name, shape, chunk_shape(shape, rows_per_step), element)
            for name, (shape, element) in shapes.items()
        }
        self._before: set[int] = set()
        self._after: set[int] = set()
        self._tokens: set[int] = set()

    def write_before(
        self,
        step: int,
        hidden_SLH: npt.NDArray[np.floating],
        logits_SLE: npt.NDArray[np.floating],
        token_S: npt.NDArray[np.integer],
        group_S: npt.NDArray[np.integer],
    ) -> None:
        """Take what the old log-prob pass saw of the tokens sampled of mini-step `step`.

        Args:
            step: one of the sampled mini-steps.
            hidden_SLH: what the routers were given, float32.
            logits_SLE: what they said, float32.
            token_S: row of each token in the routing archive; each token is sampled once.
            group_S: prompt group of each token.

        Raises:
            RoutingMismatch: another shape, a number that is not finite, or a step or token that is not expected.
        """
        rows = self._rows(step, self._before, "before the update")
        self._check_indices(step, token_S, group_S)
        self._check(step, "logits", logits_SLE, self._provenance.origin.num_experts)
        self._check(step, "hidden states", hidden_SLH, self._provenance.origin.hidden_size)
        self._arrays["hidden"][:, rows] = self._kept(step, hidden_SLH)
        self._arrays["old_logits"][:, rows] = _by_layer(logits_SLE)
        self._arrays["mini_step"][rows] = np.full(len(token_S), step, dtype=np.uint16)
        self._arrays["token"][rows] = token_S.astype(np.int64)
        self._arrays["group"][rows] = group_S.astype(np.int64)
        self._before.add(step)
        self._tokens.update(token_S.tolist())

    def write_after(self, step: int, logits_SLE: npt.NDArray[np.floating]) -> None:
        """Take what the routers said at mini-step `step` of the same tokens in the same order.

        Raises RoutingMismatch as `write_before` does.
        """
        rows = self._rows(step, self._after, "at its mini-step")
        self._check(step, "logits", logits_SLE, self._provenance.origin.num_experts)
        self._arrays["new_logits"][:, rows] = _by_layer(logits_SLE)
        self._after.add(step)

    def close(self) -> EvolutionProvenance:
        """Finish the group; raises RoutingMismatch unless each sampled mini-step was seen before and after."""
        steps = self._provenance.sampled_steps
        lacking = [step for step in steps if step not in self._before & self._after]
        if lacking:
            raise RoutingMismatch(
                f"router evolution of mini-steps {lacking} is not whole: of {list(steps)}, {sorted(self._before)} were "
                f"seen before the update and {sorted(self._after)} at their own mini-step; record both of each"
            )
        self._group.update_attributes(FORMAT.attributes(self._provenance))
        return self._provenance

    def _rows(self, step: int, written: set[int], when: str) -> slice:
        steps, size = self._provenance.sampled_steps, self._provenance.rows_per_step
        if step not in steps or step in written:
            told = "was written already" if step in written else f"is none of those sampled, {steps}"
            raise RoutingMismatch(f"router evolution of mini-step {step} {when} {told}; write each of them once")
        first = steps.index(step) * size
        return slice(first, first + size)

    def _check(self, step: int, name: str, values_SLX: npt.NDArray[np.floating], width: int) -> None:
        layers = self._provenance.origin.layers
        expected = (self._provenance.rows_per_step, len(layers), width)
        if values_SLX.shape != expected or values_SLX.dtype != np.float32:
            raise RoutingMismatch(
                f"{name} of mini-step {step} are {values_SLX.dtype} of shape {values_SLX.shape}, expected float32 of "
                f"shape {expected}: sampled tokens, MoE layers, width"
            )
        for position, layer in enumerate(layers):
            if not np.isfinite(values_SLX[:, position]).all():
                raise self._not_finite(step, name, layer, values_SLX[:, position])

    def _check_indices(self, step: int, token_S: npt.NDArray[np.integer], group_S: npt.NDArray[np.integer]) -> None:
        size = self._provenance.rows_per_step
        for name, index_S in (("token rows", token_S), ("prompt groups", group_S)):
            whole = np.issubdtype(index_S.dtype, np.integer)
            if index_S.shape != (size,) or not whole or int(index_S.min()) < 0:
                raise RoutingMismatch(
                    f"{name} of mini-step {step} are {index_S.dtype} of shape {index_S.shape}, expected {size} "
                    "integers from 0 on: one per sampled token"
                )
        tokens = set(token_S.tolist())
        if len(tokens) < size or tokens & self._tokens:
            raise RoutingMismatch(
                f"tokens of mini-step {step} are sampled twice: {size} rows name {len(tokens)} tokens, "
                f"{len(tokens & self._tokens)} of them seen in another mini-step; sample each token once"
            )

    def _kept(self, step: int, hidden_SLH: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16] | Floats:
        """[L, S, H], as it is stored."""
        if self._provenance.dtype == "float32":
            return _by_layer(hidden_SLH)
        num_tokens, num_layers, size = hidden_SLH.shape
        bits_LSH = np.empty((num_layers, num_tokens, size), dtype=np.uint16)
        for position, layer in enumerate(self._provenance.origin.layers):
            bits_LSH[position] = bfloat16_bits(hidden_SLH[:, position])
            # The largest of float32 round up to infinity.
            if not np.isfinite(bfloat16_floats(bits_LSH[position])).all():
                raise self._not_finite(step, "bfloat16 hidden states", layer, bfloat16_floats(bits_LSH[position]))
        return bits_LSH

    def _not_finite(self, step: int, name: str, layer: int, values_SX: npt.NDArray[np.floating]) -> RoutingMismatch:
        count = int((~np.isfinite(values_SX)).sum())
        return RoutingMismatch(
            f"{name} of decoder layer {layer} at mini-step {step} hold {count} numbers of {values_SX.size} that are "
            "not finite; the policy diverged: lower training.learning_rate, and start a new run"
        )


def array_shapes(provenance: EvolutionProvenance) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """Shape and dtype of each array of the group."""
    origin, tokens = provenance.origin, provenance.tokens
    num_layers, hidden = len(origin.layers), np.uint16 if provenance.dtype == "bfloat16" else np.float32
    return {
        "hidden": ((num_layers, tokens, origin.hidden_size), hidden),
        "old_logits": ((num_layers, tokens, origin.num_experts), np.float32),
        "new_logits": ((num_layers, tokens, origin.num_experts), np.float32),
        "mini_step": ((tokens,), np.uint16),
        "token": ((tokens,), np.int64),
        "group": ((tokens,), np.int64),
    }


def chunk_shape(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """One layer of one mini-step's rows."""
    return (rows,) if len(shape) == 1 else (1, rows, shape[2])


def bfloat16_bits(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def bfloat16_floats(bits: npt.NDArray[np.uint16]) -> Floats:
    """The float32 numbers that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _by_layer(values_SLX: npt.NDArray[np.floating]) -> Floats:
    return np.asarray(values_SLX, dtype=np.float32).transpose(1, 0, 2)
