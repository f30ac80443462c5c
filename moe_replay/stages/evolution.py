"""Recording router evolution while a batch is trained: which tokens are sampled, and what is kept of them.

Features are taken in the old log-prob pass and at the token's own mini-step (PR2, arXiv 2606.00395); mini-step 1 is
skipped, since its weights are those of the old pass. What one mini-step samples is written at once, so memory holds
the features of one mini-batch's sample and never those of a batch.

Shapes: S sampled tokens of one mini-step, L MoE layers, H hidden size, E experts.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_replay.archive.artifacts import StageWriter
from moe_replay.archive.evolution import EvolutionOrigin, EvolutionWriter
from moe_replay.archive.routes import RouteArchive
from moe_replay.config import RunConfig
from moe_replay.engines.training import Pass, TrainingEngine
from moe_replay.stages.responses import Responses

FIRST_STEP = 2
"""The first mini-step whose routers have moved."""

Positions = list[npt.NDArray[np.int64]]
"""Sampled positions of each sequence of a mini-batch, ascending."""


class EvolutionRecorder:
    """Samples token positions of mini-steps 2 to κ and keeps what the routers saw of them, before and after."""

    def __init__(
        self,
        writer: StageWriter,
        engine: TrainingEngine,
        config: RunConfig,
        responses: Responses,
        archive: RouteArchive,
        weights_sha256: str,
        seed: int,
    ) -> None:
        steps = tuple(range(FIRST_STEP, config.training.mini_steps + 1))
        parts = responses.parts(config.training.mini_steps)
        lengths = [sequence.num_tokens for sequence in responses.sequences]
        # The last token of a sequence was never fed at rollout and is no evidence of anything.
        fed = {step: [length - 1 for length in lengths[parts[step - 1]]] for step in steps}
        rows = min(max(1, config.evolution.tokens // len(steps)), *(sum(counts) for counts in fed.values()))
        generator = np.random.default_rng(seed)
        self._sampled = {step: _sample(generator, counts, rows) for step, counts in fed.items()}
        self._parts, self._groups_N = parts, responses.groups_N
        self._starts = [tokens.start for tokens in archive.sequence_tokens(0, archive.num_sequences)]
        origin = EvolutionOrigin(
            weights_sha256=weights_sha256,
            layers=engine.layers,
            num_experts=engine.num_experts,
            top_k=engine.top_k,
            hidden_size=engine.hidden_size,
            mini_steps=config.training.mini_steps,
        )
        self._writer = EvolutionWriter(writer, origin, rows, steps, config.evolution.dtype)

    def sampled(self, step: int) -> Positions | None:
        """The positions to watch in the mini-batch of mini-step `step`, counted from 1."""
        return self._sampled.get(step)

    def before(self, step: int, seen: Pass) -> None:
        """Keep what the old log-prob pass saw of the mini-batch."""
        if (positions := self._sampled.get(step)) is None:
            return
        assert seen.features is not None
        first = self._parts[step - 1].start
        token_S = [self._starts[first + i] + places for i, places in enumerate(positions)]
        group_S = [np.full(len(places), self._groups_N[first + i]) for i, places in enumerate(positions)]
        self._writer.write_before(
            step,
            seen.features.hidden_SLH.numpy(),
            seen.features.logits_SLE.numpy(),
            np.concatenate(token_S),
            np.concatenate(group_S).astype(np.int64),
        )

    def after(self, step: int, seen: Pass) -> None:
        """Keep the logits of the mini-batch at its own mini-step."""
        if step in self._sampled:
            assert seen.features is not None
            self._writer.write_after(step, seen.features.logits_SLE.numpy())

    def close(self) -> None:
        """Finish the archive; every sampled mini-step has been told of."""
        self._writer.close()


def _sample(generator: np.random.Generator, counts: list[int], rows: int) -> Positions:
    """`rows` of all positions of a mini-batch, without replacement."""
    bounds = np.cumsum([0, *counts])
    drawn: Any = np.sort(generator.choice(int(bounds[-1]), rows, replace=False))
    edges = np.searchsorted(drawn, bounds)
    return [drawn[start:stop] - first for start, stop, first in zip(edges[:-1], edges[1:], bounds[:-1], strict=True)]
