"""Rows of expert sets for the codec's tests."""

import numpy as np

from moe_replay.routing.trace import route_dtype


def random_sets(rows, num_experts, top_k, seed=0, weights=1.0):
    """Distinct experts in random order, popular ones (large weights) more often."""
    rng = np.random.default_rng(seed)
    arrivals = rng.exponential(size=(rows, num_experts)) / weights
    return np.argsort(arrivals, axis=1)[:, :top_k].astype(route_dtype(num_experts))


def local_sets(rows, num_experts, top_k, kept):
    """Each row keeps `kept` experts of the one before it."""
    rng = np.random.default_rng(0)
    ids_RK = random_sets(rows, num_experts, top_k)
    for row in range(1, rows):
        old = rng.permutation(ids_RK[row - 1])[:kept]
        new = np.setdiff1d(rng.permutation(num_experts), old, assume_unique=True)
        ids_RK[row] = np.concatenate([old, new[: top_k - kept]])
    return ids_RK
