"""Train-infer mismatch of finished runs side by side.

    python benchmarks/mismatch.py RUN [RUN ...] [--root URL]

Prints mean, median and 90th percentile of `mismatch/kl_k3` over a run's iterations, and how many iterations had an
extreme token (probability ratio above 2 either way).
"""

import argparse

import numpy as np

from moe_replay.archive.artifacts import RunStore
from moe_replay.config import RunConfig
from moe_replay.environment import set_defaults
from moe_replay.places import run_root
from moe_replay.reports.results import iteration_metrics


def main() -> None:
    """Print one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", default=None)
    asked = parser.parse_args()
    set_defaults()
    root = asked.root or run_root(RunConfig())
    print(f"{'run':24} {'iterations':>10} {'mean':>9} {'median':>9} {'p90':>9} {'with extreme tokens':>20}")
    for run in asked.runs:
        store = RunStore(root, run)
        seen = [iteration_metrics(store, iteration) for iteration in store.iterations()]
        kl = np.array([metrics["mismatch/kl_k3"] for metrics in seen])
        extreme = sum(metrics["mismatch/extreme_fraction"] > 0 for metrics in seen)
        numbers = f"{kl.mean():9.2e} {np.median(kl):9.2e} {np.quantile(kl, 0.9):9.2e}"
        print(f"{run:24} {len(seen):10} {numbers} {f'{extreme} of {len(seen)}':>20}")


if __name__ == "__main__":
    main()
