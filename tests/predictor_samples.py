"""Runs whose routers drift in a known way: decoder layer 1 along a planted matrix, layer 3 at random."""

from pathlib import Path

import numpy as np

from moe_replay.archive.artifacts import ArtifactRef
from moe_replay.archive.evolution import EvolutionOrigin, EvolutionWriter
from moe_replay.config_reading import load_config
from moe_replay.stages.predictor import fit_predictor
from moe_replay.stages.run import DataFile, Run

LAYERS, PLANTED, RANDOM = (1, 3), 1, 3
EXPERTS, HIDDEN, TOP_K = 8, 12, 2
STEPS, ROWS = (2, 3), 160
GROUPS = 16
ORIGIN = EvolutionOrigin(
    weights_sha256="0" * 64, layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, mini_steps=3
)


def make_run(root: Path, run_id: str = "run-1", **settings) -> Run:
    """A run with these settings (`predictor__window=2`) and nothing committed."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    config = load_config(None, {"method": "pr2", "storage.root": str(root), **overrides})
    nowhere = DataFile(path=root / "train.parquet", sha256="0" * 64)
    run = Run(
        run_id=run_id,
        root=str(root),
        home=root / "home",
        config=config,
        model=root / "model",
        model_sha256="0" * 64,
        train=nowhere,
        benchmarks={},
    )
    run.store().create_run({"config": config.model_dump(mode="json"), "model_sha256": run.model_sha256})
    return run


def planted() -> np.ndarray:
    """The drift of layer 1 per unit of input."""
    return np.random.default_rng(7).normal(size=(EXPERTS, HIDDEN)) * 0.03


def train(run: Run, iteration: int, origin: EvolutionOrigin = ORIGIN, strength: float = 1.0) -> ArtifactRef:
    """Commit a training that recorded evolution, and a checkpoint of a few bytes."""
    rng = np.random.default_rng((iteration, 11))
    writer = run.store().begin("training", iteration, {}, run.digest("training"))
    writer.write_bytes("checkpoint/model", b"weights")
    evolution = EvolutionWriter(writer, origin, ROWS, STEPS, "float32")
    shape = (ROWS, len(origin.layers))
    for number, step in enumerate(STEPS):
        hidden_SLH = rng.normal(size=(*shape, origin.hidden_size)).astype(np.float32)
        old_SLE = rng.normal(size=(*shape, origin.num_experts)).astype(np.float32)
        drift_SLE = rng.normal(size=old_SLE.shape) * 0.05
        if origin == ORIGIN:
            drift_SLE[:, 0] += strength * hidden_SLH[:, 0] @ planted().T
        rows = number * ROWS + np.arange(ROWS)
        evolution.write_before(step, hidden_SLH, old_SLE, rows, rows % GROUPS)
        evolution.write_after(step, (old_SLE + drift_SLE).astype(np.float32))
    evolution.close()
    return writer.commit()


def train_and_fit(run: Run, iterations: int) -> list[ArtifactRef]:
    """Commit trainings and predictors up to an iteration as the flow does; returns the predictors."""
    fork = run.forked_from
    trainings, previous = (fork.trainings, fork.predictor) if fork else ((), None)
    predictors: list[ArtifactRef] = []
    for iteration in range(fork.iteration if fork else 0, iterations):
        trainings = (train(run, iteration), *trainings)[: run.config.predictor.window]
        previous = fit_predictor(run, iteration, trainings, previous)
        predictors.append(previous)
    return predictors
