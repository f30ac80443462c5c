"""Routes of tokens: which experts served each token in each MoE layer, and for which tokens that is known.

Legend: T tokens, L MoE layers, K experts per token, E experts. Plain numpy, so that storage needs no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from moe_replay.errors import RoutingMismatch

RouteIds = npt.NDArray[np.uint8 | np.uint16]

MIN_TOKENS_TO_JUDGE = 64
"""Captured tokens below which constant routes prove nothing."""

_BLOCK_TOKENS = 16384


def route_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The narrowest dtype that holds expert ids 0..E-1; raises RoutingMismatch unless 1 <= E <= 65536."""
    if not 1 <= num_experts <= 65536:
        raise RoutingMismatch(
            f"{num_experts} experts per layer can't be stored: ids are 16 bits wide, so 1 to 65536 experts; "
            "check num_experts in the model's config"
        )
    return np.uint8 if num_experts <= 256 else np.uint16


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routes of T consecutive tokens, checked on construction.

    Raises RoutingMismatch when shapes, dtype, ids or missing rows break the rules below.
    """

    ids_TLK: RouteIds
    """Expert ids; zeros in missing rows. uint8 up to 256 experts, else uint16.

    A row is a set: a fresh capture has the engine's order, an archive gives ids ascending unless it kept that order.
    """
    valid_T: npt.NDArray[np.bool_]
    """False where no route was captured: the row is missing, and its zeros name no expert."""
    num_experts: int
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""

    def __post_init__(self) -> None:
        check_layers(self.layers)
        dtype = np.dtype(route_dtype(self.num_experts))
        shape = self.ids_TLK.shape
        if len(shape) != 3 or shape[1] != len(self.layers) or not 1 <= shape[2] <= self.num_experts:
            raise RoutingMismatch(
                f"route ids have shape {shape}; expected [tokens, {len(self.layers)} layers, 1 to {self.num_experts} "
                "experts]; check the layer map and the model's config"
            )
        if self.ids_TLK.dtype != dtype:
            raise RoutingMismatch(
                f"route ids are {self.ids_TLK.dtype}; {self.num_experts} experts are stored as {dtype}: narrow them at "
                "the edge with RoutingTrace.from_capture"
            )
        if self.valid_T.shape != shape[:1] or self.valid_T.dtype != np.bool_:
            raise RoutingMismatch(
                f"validity is {self.valid_T.dtype} of shape {self.valid_T.shape}; expected bool of shape {shape[:1]}: "
                "one per token"
            )
        _check_ids(self.ids_TLK, self.valid_T, self.num_experts, self.layers)

    @classmethod
    def from_capture(
        cls, ids_RLK: npt.NDArray[np.integer], num_tokens: int, num_experts: int, layers: Sequence[int]
    ) -> "RoutingTrace":
        """The trace of one sequence from an engine's capture of R rows, of any integer dtype.

        An engine never feeds the last token it samples, so T-1 rows mean that the last is missing. Raises
        RoutingMismatch for any other count, a layer count unlike the layer map, and ids outside 0..E-1.
        """
        ids_RLK = np.asarray(ids_RLK)
        if ids_RLK.ndim != 3 or not np.issubdtype(ids_RLK.dtype, np.integer):
            raise RoutingMismatch(
                f"captured routes are {ids_RLK.dtype} of shape {ids_RLK.shape}; expected integers "
                "[rows, layers, experts per token]; the engine's capture format is not one this code knows"
            )
        rows, num_layers, top_k = ids_RLK.shape
        if rows not in (num_tokens - 1, num_tokens):
            raise RoutingMismatch(
                f"routes cover {rows} rows but the sequence has {num_tokens} tokens (expected {num_tokens - 1} or "
                f"{num_tokens}); the rollout ran without route capture or was cut: re-run it, routes are never padded"
            )
        if num_layers != len(layers):
            raise RoutingMismatch(
                f"routes cover {num_layers} layers but the model has {len(layers)} MoE layers (decoder layers "
                f"{tuple(layers)}); select the MoE layers by decoder layer index before"
            )
        # Before narrowing, which would wrap a wrong id around into a legal one.
        if ids_RLK.size and not 0 <= int(ids_RLK.min()) <= int(ids_RLK.max()) < num_experts:
            raise RoutingMismatch(
                f"captured expert ids span {ids_RLK.min()} to {ids_RLK.max()}; the model has experts 0 to "
                f"{num_experts - 1}: the routes are of another model or the capture is damaged"
            )
        ids_TLK = np.zeros((num_tokens, num_layers, top_k), dtype=route_dtype(num_experts))
        ids_TLK[:rows] = ids_RLK
        return cls(ids_TLK, np.arange(num_tokens) < rows, num_experts, tuple(layers))

    @classmethod
    def concatenate(cls, traces: Sequence["RoutingTrace"]) -> "RoutingTrace":
        """Tokens of several traces one after the other; raises RoutingMismatch unless all are of one model."""
        if not traces:
            raise RoutingMismatch("no traces to concatenate: layers and experts are unknown; give at least one")
        first = traces[0]
        for i, trace in enumerate(traces):
            trace.require_model(first.num_experts, first.top_k, first.layers, f"trace {i}")
        return cls(
            np.concatenate([trace.ids_TLK for trace in traces]),
            np.concatenate([trace.valid_T for trace in traces]),
            first.num_experts,
            first.layers,
        )

    @property
    def num_tokens(self) -> int:
        """T, missing rows included."""
        return self.ids_TLK.shape[0]

    @property
    def num_layers(self) -> int:
        """L, MoE layers only."""
        return self.ids_TLK.shape[1]

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        return self.ids_TLK.shape[2]

    def slice_tokens(self, start: int, stop: int) -> "RoutingTrace":
        """Tokens start..stop-1; raises RoutingMismatch when the range leaves the trace."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise RoutingMismatch(f"tokens {start}:{stop} leave a trace of {self.num_tokens} tokens; fix the range")
        return RoutingTrace(self.ids_TLK[start:stop], self.valid_T[start:stop], self.num_experts, self.layers)

    def select_layers(self, layers: Sequence[int]) -> "RoutingTrace":
        """The routes of some layers, given by decoder layer index; raises RoutingMismatch for one it lacks."""
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise RoutingMismatch(f"no routes of decoder layers {missing}; the trace has {self.layers}")
        positions = [self.layers.index(layer) for layer in layers]
        return RoutingTrace(self.ids_TLK[:, positions], self.valid_T, self.num_experts, tuple(layers))

    def ascending(self) -> "RoutingTrace":
        """The same sets, each row by ascending id, so that sums over experts do not depend on how routes were kept."""
        return RoutingTrace(np.sort(self.ids_TLK, axis=-1), self.valid_T, self.num_experts, self.layers)

    def require_model(self, num_experts: int, top_k: int, layers: tuple[int, ...], name: str) -> None:
        """Raise RoutingMismatch, calling this trace by `name`, unless it has these experts, top-k and layers."""
        found, expected = (self.num_experts, self.top_k, self.layers), (num_experts, top_k, layers)
        if found != expected:
            raise RoutingMismatch(
                f"{name} has (experts, top_k, layers) = {found}, expected {expected}; the routes are of another model "
                "or layer map: capture them again"
            )


def check_layers(layers: tuple[int, ...]) -> None:
    """Raise RoutingMismatch unless `layers` are at least one decoder layer index, each once and ascending."""
    if not layers or layers[0] < 0 or any(b <= a for a, b in pairwise(layers)):
        raise RoutingMismatch(
            f"layer map {layers} is not a list of decoder layer indices, ascending, each once; a dense model has none "
            "and can't be replayed"
        )


def refuse_dead_capture(traces: Sequence[RoutingTrace]) -> None:
    """Raise RoutingMismatch when the engine's capture buffer was evidently never written.

    Give it the whole rollout batch, whose traces are of one model: the rule speaks of many tokens. A kernel that fuses
    routing into the expert computation leaves the buffer as it was, so each layer repeats one row, order included, for
    all tokens. An all-zero buffer with K >= 2 names an expert twice and never becomes a RoutingTrace. Routes of real
    routers pass, collapsed ones too: a collapsed router stays constant in its own layer, but routers of several layers
    do not all keep one order of one set over MIN_TOKENS_TO_JUDGE tokens. Not judged are a single layer (collapse looks
    the same) and K = E (every token has the same set by right).
    """
    num_rows = sum(int(trace.valid_T.sum()) for trace in traces)
    first = next((trace for trace in traces if trace.valid_T.any()), None)
    if first is None or num_rows < MIN_TOKENS_TO_JUDGE or first.num_layers < 2 or first.top_k == first.num_experts:
        return
    row_LK = first.ids_TLK[first.valid_T.argmax()]
    # Trace by trace, up to the first that differs: the batch's routes are large, and live ones differ in the first.
    if all((trace.ids_TLK[trace.valid_T] == row_LK).all() for trace in traces):
        raise RoutingMismatch(
            f"all {num_rows} captured tokens have the same routes in each of {first.num_layers} layers (experts "
            f"{row_LK[0].tolist()} in decoder layer {first.layers[0]}); the engine's fused kernel bypasses route "
            "capture: use an engine and kernel that record routes, or a method without them"
        )


def _check_ids(ids_TLK: RouteIds, valid_T: npt.NDArray[np.bool_], num_experts: int, layers: tuple[int, ...]) -> None:
    for start, block_TLK, valid_B in _blocks(ids_TLK, valid_T):
        if block_TLK[~valid_B].any():
            row = start + int(np.flatnonzero(~valid_B & block_TLK.any(axis=(1, 2)))[0])
            raise RoutingMismatch(
                f"row {row} is marked missing but names experts; missing rows hold zeros: the validity does not belong "
                "to these routes"
            )
        if num_experts <= np.iinfo(ids_TLK.dtype).max and (block_TLK >= num_experts).any():
            row, layer, _ = (int(i) for i in np.argwhere(block_TLK >= num_experts)[0])
            raise RoutingMismatch(
                f"row {start + row}, decoder layer {layers[layer]} names expert {block_TLK[row, layer].max()} of "
                f"{num_experts}; ids count from 0: the routes are of another model"
            )
        twice_TL = _names_expert_twice(block_TLK) & valid_B[:, None]
        if twice_TL.any():
            row, layer = (int(i) for i in np.argwhere(twice_TL)[0])
            raise RoutingMismatch(
                f"row {start + row}, decoder layer {layers[layer]} names an expert twice: "
                f"{block_TLK[row, layer].tolist()}; no top-k does, so the row was never captured (zero-filled) or is "
                "damaged: use an engine and kernel that record routes"
            )


def _names_expert_twice(ids_TLK: RouteIds) -> npt.NDArray[np.bool_]:
    # Comparing columns pair by pair runs 14 times as fast as sorting rows of 8.
    columns = [np.ascontiguousarray(ids_TLK[..., k]) for k in range(ids_TLK.shape[-1])]
    twice_TL = np.zeros(ids_TLK.shape[:-1], dtype=bool)
    for a_TL, b_TL in combinations(columns, 2):
        twice_TL |= a_TL == b_TL
    return twice_TL


def _blocks(ids_TLK: RouteIds, valid_T: npt.NDArray[np.bool_]) -> Iterator[tuple[int, RouteIds, npt.NDArray[np.bool_]]]:
    # Bounds the memory of the checks, which need copies of what they look at.
    for start in range(0, len(ids_TLK), _BLOCK_TOKENS):
        yield start, ids_TLK[start : start + _BLOCK_TOKENS], valid_T[start : start + _BLOCK_TOKENS]
