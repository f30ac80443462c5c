"""Router evolution of an iteration: what the routers were given and said before the update, and what they said after.

Group `evolution` of a training artifact; legend: S sampled tokens, L MoE layers, H hidden size, E experts.
`docs/archive-format.md` is the specification; the words are PR2's (arXiv 2606.00395).

    hidden      [L, S, H] bfloat16's bits as uint16, or float32   what the routers were given in the old log-prob pass
    old_logits  [L, S, E] float32   what they said then
    new_logits  [L, S, E] float32   what they said of the same tokens at the tokens' own mini-step
    mini_step   [S]       uint16    that mini-step, counted from 1
    token       [S]       int64     row of the token in the iteration's routing archive
    group       [S]       int64     prompt group of the token
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zarr

from moe_replay.archive.evolution_writing import (
    FORMAT,
    EvolutionOrigin,
    EvolutionProvenance,
    EvolutionWriter,
    Floats,
    Integers,
    array_shapes,
    bfloat16_floats,
    chunk_shape,
)
from moe_replay.archive.reading import Artifact
from moe_replay.errors import ReplayError, RoutingMismatch

__all__ = [
    "EvolutionArchive",
    "EvolutionOrigin",
    "EvolutionProvenance",
    "EvolutionWriter",
    "LayerEvolution",
    "has_evolution",
    "verify_evolution",
]


class LayerEvolution(NamedTuple):
    """The evolution of one router over all sampled tokens, float32."""

    hidden_SH: Floats
    """What it was given in the old log-prob pass."""
    old_SE: Floats
    """Its logits then."""
    new_SE: Floats
    """Its logits for the same tokens at their mini-step."""


class EvolutionArchive:
    """The router evolution of one training, opened for reading; every chunk is checked when it is read."""

    def __init__(self, artifact: Artifact, group: zarr.Group, provenance: EvolutionProvenance) -> None:
        self.artifact = artifact
        self.provenance = provenance
        self._arrays = {name: FORMAT.open_array(artifact, group, name) for name in array_shapes(provenance)}
        for name, (shape, dtype) in array_shapes(provenance).items():
            array, chunks = self._arrays[name], chunk_shape(shape, provenance.rows_per_step)
            FORMAT.require(artifact, array, shape, dtype)
            if array.chunks != chunks:
                raise FORMAT.corrupt(artifact, f"{name} has chunks of {array.chunks}, expected {chunks}")
        self.mini_step_S: npt.NDArray[np.uint16] = self._read("mini_step", slice(None))
        """The mini-step of each token, counted from 1."""
        self.token_S: Integers = self._read("token", slice(None))
        """Row of each token in the iteration's routing archive."""
        self.group_S: Integers = self._read("group", slice(None))
        """Prompt group of each token."""
        self._check_indices()

    @classmethod
    def open(cls, artifact: Artifact) -> "EvolutionArchive":
        """Open and check everything but hidden states and logits.

        Raises ArchiveCorrupt when an object is damaged, or the evolution is of another run, iteration or shape, and
        ConfigError when retention removed it.
        """
        return cls(artifact, *FORMAT.open(artifact, EvolutionProvenance))

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.provenance.tokens

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layer index of each MoE layer."""
        return self.provenance.origin.layers

    def read_layer(self, position: int) -> LayerEvolution:
        """The evolution of one MoE layer (a position in `layers`, not a decoder index); reads no other layer's chunks.

        Raises ArchiveCorrupt when a chunk of it is damaged or holds a number that is not finite, RoutingMismatch when
        there is no such layer.
        """
        if not 0 <= position < len(self.layers):
            raise RoutingMismatch(
                f"MoE layer {position} is none of the {len(self.layers)} whose evolution {self.artifact.name} holds; "
                f"give a position from 0 to {len(self.layers) - 1}"
            )
        hidden = self._read("hidden", position)
        hidden_SH = bfloat16_floats(hidden) if self.provenance.dtype == "bfloat16" else hidden
        found = LayerEvolution(hidden_SH, self._read("old_logits", position), self._read("new_logits", position))
        for name, values in zip(("hidden", "old_logits", "new_logits"), found, strict=True):
            if not np.isfinite(values).all():
                count = int((~np.isfinite(values)).sum())
                raise FORMAT.corrupt(
                    self.artifact,
                    f"{name} of decoder layer {self.layers[position]} holds {count} numbers that are not finite",
                )
        return found

    def _read(self, name: str, part: int | slice) -> npt.NDArray:
        return FORMAT.read_part(self.artifact, self._arrays[name], part)

    def _check_indices(self) -> None:
        provenance = self.provenance
        expected_S = np.repeat(provenance.sampled_steps, provenance.rows_per_step)
        if not np.array_equal(self.mini_step_S, expected_S):
            raise FORMAT.corrupt(
                self.artifact,
                f"mini_step is not {provenance.rows_per_step} rows of each of {provenance.sampled_steps}, one after "
                "the other",
            )
        lowest = min(int(self.token_S.min()), int(self.group_S.min()))
        distinct = len(np.unique(self.token_S))
        if lowest < 0 or distinct < provenance.tokens:
            raise FORMAT.corrupt(
                self.artifact,
                f"its {provenance.tokens} samples name {distinct} tokens, and the least token row or prompt group is "
                f"{lowest}; each token is sampled once, and both count from 0",
            )


def has_evolution(artifact: Artifact) -> bool:
    """Whether a training recorded router evolution that retention left."""
    return any(stored.path.startswith(f"{FORMAT.group}/") for stored in artifact.kept)


def verify_evolution(artifact: Artifact) -> list[str]:
    """Re-read every object and all evolution of a training, a layer at a time; what is wrong, one line each."""
    problems = artifact.problems()
    if problems:
        return problems
    try:
        archive = EvolutionArchive.open(artifact)
        for position in range(len(archive.layers)):
            archive.read_layer(position)
    except ReplayError as error:
        return [f"{artifact.name}: {error}"]
    return []
