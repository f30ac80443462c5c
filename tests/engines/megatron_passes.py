"""Passes that verl's Megatron engine must make as its FSDP2 engine does, and where it works on a CPU."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from passes import BATCH, LENGTHS, SAMPLED, assert_same_pass
from trainer import E, Trainer, foreign_routes, largest_difference
from training_calls import Asked, Seen

from moe_replay.routing.trace import RoutingTrace

TRAINING: dict[str, Any] = {"packing": True, "micro_batch_tokens": 24, "learning_rate": 1e-3, "warmup_steps": 4}
MEGATRON = {**TRAINING, "engine": "megatron"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "megatron_on_cpu",
}


def captured(layers: int) -> list[RoutingTrace]:
    """Routes as an inference engine has them, without the last row."""
    whole = foreign_routes(LENGTHS, layers=tuple(range(layers)))
    return [RoutingTrace.from_capture(one.ids_TLK[:-1], one.num_tokens, E, one.layers) for one in whole]


def passes_of(trainer: Trainer, method: str = "r3", layers: int = 3) -> list[Seen]:
    """Scores and steps, the last of which shows what the steps did."""
    importance = np.linspace(0.5, 2.0, BATCH.old_NS.size, dtype="float32").reshape(BATCH.old_NS.shape)
    batch = replace(BATCH, importance_NS=importance) if method == "tis" else BATCH
    reference = captured(layers)
    routes = None if method in ("gspo", "tis") else reference
    asked = Asked(reference=reference, sampled=SAMPLED)
    return [
        trainer.score(batch, None),
        trainer.score(batch, routes, asked),
        trainer.step(batch, routes, asked),
        trainer.step(batch, routes, replace(asked, lr_factor=0.5)),
        trainer.score(batch, None),
    ]


def assert_same_passes(ours: list[Seen], theirs: list[Seen]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_pass(mine, other)
        assert largest_difference(mine.log_probs + mine.entropy, other.log_probs + other.entropy) < 1e-5
        assert mine.grad_norm == pytest.approx(other.grad_norm, abs=1e-5)
    for mine, other in zip(ours[1:4], theirs[1:4], strict=True):
        assert len(mine.hidden_SLH) == sum(map(len, SAMPLED))
        np.testing.assert_allclose(mine.hidden_SLH, other.hidden_SLH, rtol=0, atol=1e-5)
        np.testing.assert_allclose(mine.logits_SLE, other.logits_SLE, rtol=0, atol=1e-5)
    for mine, other in zip(ours[2:4], theirs[2:4], strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=1e-5)
    assert ours[2].grad_norm > 1e-2
    assert largest_difference(ours[0].log_probs, ours[4].log_probs) > 1e-3  # the steps did something
