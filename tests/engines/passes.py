"""A batch whose passes two training engines must make alike, and comparisons of what they saw and did."""

from pathlib import Path

import numpy as np
from models import same_sets
from safetensors.numpy import load_file
from trainer import Trainer, foreign_routes, largest_difference
from training_calls import Seen, random_batch

BATCH = random_batch(sequences=10)
LENGTHS = [len(prompt) + len(response) for prompt, response in zip(BATCH.prompts, BATCH.responses, strict=True)]
ROUTES = foreign_routes(LENGTHS)
SAMPLED = [np.arange(length)[number % 2 :: 2] for number, length in enumerate(LENGTHS)]
# Of 24 tokens, the longest sequence: each rank packs micro-batches of its own.
TRAINING = {"micro_batch_tokens": 24, "learning_rate": 1e-3, "warmup_steps": 4}
BETA = 0.9


def assert_same_pass(one: Seen, two: Seen) -> None:
    assert largest_difference(one.log_probs, two.log_probs) < 1e-5
    assert all(same_sets(a, b).all() for a, b in zip(one.live, two.live, strict=True))
    for a, b in zip(one.coverage_gap, two.coverage_gap, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def gradients(trainer: Trainer, folder: Path) -> dict[str, np.ndarray]:
    """Of the first step since the model was loaded, clipped, from Adam's first moment."""
    trainer.save(folder)
    moments = load_file(folder / "optimizer" / "optimizer.safetensors")
    return {key: value / (1 - BETA) for key, value in moments.items() if key.endswith("/exp_avg")}


def assert_close(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-5, err_msg=name)
