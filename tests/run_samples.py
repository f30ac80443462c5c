"""Small runs with made-up numbers, written by the real writers, for the tests of reports."""

import hashlib
import uuid

import numpy as np

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.log_probs import write_log_probs
from moe_replay.routing.statistics import ROUTING_FILE, MiniStepRouting, RoutingStatistics

DIGEST = "config-digest"
LAYERS = (1, 2, 5)
EXPERTS = 8
AGREEMENT_DROP = 0.01
"""Agreement lost at each mini-step."""
CONFIG = {
    "seed": 0,
    "iterations": 4,
    "method": {"name": "grpo", "route_source": "none", "predictor": False},
    "model": {"path": "embedded"},
    "data": {"train": "embedded"},
    "rollout": {"prompts": 8, "gate_dtype": "engine"},
    "training": {"mini_steps": 2, "learning_rate": 1e-4},
    "predictor": {"objective": "ridge"},
    "evaluation": {"benchmarks": {"addition": "embedded"}, "every": 1},
}


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def in_memory():
    """A root of its own that costs no disk."""
    return f"memory://{uuid.uuid4().hex}"


def make_run(root, run_id, method="grpo", seed=0, iterations=4, kappa=2, scale=1.0, label=None, own=0, **changes):
    """A run whose mismatch is `scale` times that of others of its seed and `own` noise; `changes` are of run.json."""
    store = RunStore(str(root), run_id)
    predicts = method == "pr2"
    config = CONFIG | {"seed": seed, "method": {"name": method, "route_source": "none", "predictor": predicts}}
    config["training"] = CONFIG["training"] | {"mini_steps": kappa}
    document = {
        "run_id": run_id,
        "config": config | changes.pop("config", {}),
        "model_sha256": sha256("model"),
        "train_sha256": sha256("train"),
        "benchmarks_sha256": {"addition": sha256("addition")},
    }
    store.create_run(document | changes)
    for iteration in range(iterations):
        add_iteration(store, iteration, np.random.default_rng([seed, iteration, own]), kappa, scale, label or method)
    return store


def add_iteration(store, iteration, rng, kappa, scale, label) -> None:
    """Commit all stages of an iteration; equal generators give equal numbers but for `scale`."""
    store.begin("rollout", iteration, {}, DIGEST).commit({"reward/mean": rng.uniform(0.4, 0.6), "reward/std": 0.4})
    store.begin("routes", iteration, {}, DIGEST).commit(attributes={"tokens": 100})
    training = store.begin("training", iteration, {}, DIGEST)
    training.write_bytes("checkpoint/model", b"weights")
    rollout = [rng.normal(-1, 0.5, 20).astype(np.float32) for _ in range(4)]
    old = [one + scale * rng.standard_t(3, 20).astype(np.float32) / 4 for one in rollout]
    write_log_probs(training, range(4), rollout, old)
    training.write_bytes(ROUTING_FILE, statistics(rng, kappa, scale).model_dump_json().encode())
    agreements = {
        f"routing/agreement_step_{step}": 0.99 - AGREEMENT_DROP * scale * step for step in range(1, kappa + 1)
    }
    kl = scale * rng.lognormal(-7, 0.5)
    metrics = {
        **agreements,
        "mismatch/kl_k3": kl,
        "mismatch/extreme_fraction": 0.01 * (kl > 1e-3),
        "mismatch/router_fraction": 0.1 * scale,
        "mismatch/token_fraction": 0.5 * scale,
        "routing/agreement": float(np.mean(list(agreements.values()))),
        "routing/coverage_gap": 0.3 + 0.01 * scale,
        **{
            f"routing/deviation_{name}": share
            for name, share in zip(("0", "1", "2", "3plus"), deviation(scale), strict=True)
        },
        "policy/entropy": rng.uniform(1, 1.2),
        "policy/grad_norm": rng.lognormal(0, 0.2),
        "policy/clip_low": 0.01,
        "policy/clip_high": rng.uniform(0, 0.02),
    }
    training.commit(metrics, {"method": label})
    if label.startswith("pr2"):
        predictor = {"predictor/kl": 0.008, "predictor/kl_zero": 0.01}
        agreement = {"predictor/agreement": 0.982, "predictor/agreement_zero": 0.981}
        store.begin("predictor", iteration, {}, DIGEST).commit(predictor | agreement)
    scores = {"eval/addition/avg_at_n": rng.uniform(0.5, 0.6), "eval/addition/pass_at_n": rng.uniform(0.7, 0.8)}
    store.begin("evaluation", iteration, {}, DIGEST).commit(scores)


def deviation(scale):
    return 1 - 0.021 * scale, 0.02 * scale, 0.001 * scale, 0.0


def statistics(rng, kappa, scale) -> RoutingStatistics:
    num_layers = len(LAYERS)
    steps = tuple(
        MiniStepRouting(
            agreement_L=tuple(0.99 - 0.01 * scale * step - rng.uniform(0, 0.005, num_layers)),
            coverage_gap_L=tuple(0.3 + 0.01 * scale * step + rng.uniform(0, 0.005, num_layers)),
            deviation_LD=(deviation(scale),) * num_layers,
        )
        for step in range(1, kappa + 1)
    )
    return RoutingStatistics(
        layers=LAYERS,
        router_fraction_L=tuple(scale * rng.uniform(0.05, 0.1, num_layers)),
        differing_layers_B=tuple(int(100 * scale**layers / (1 + layers) ** 2) for layers in range(num_layers + 1)),
        load_LE=tuple(tuple(row) for row in rng.integers(10, 60, (num_layers, EXPERTS)).tolist()),
        mini_steps=steps,
    )
