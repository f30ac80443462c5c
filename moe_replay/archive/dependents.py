"""What runs still need of those that they were forked from, which gc leaves alone."""

from typing import Any

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import FORK_KEY
from moe_replay.archive.leftovers import runs_under
from moe_replay.errors import ReplayError


def needed_by_forks(root: str) -> dict[str, str]:
    """sha256 of each artifact that a run under `root` still starts from, and that run's id.

    A fork needs policy, predictor and the rollout that it goes on with until it has trained itself, and the source's
    trainings until it has fitted from as many of its own. A run whose document is damaged can't say what it needs.
    """
    needed: dict[str, str] = {}
    for run_id in runs_under(root):
        store = RunStore(root, run_id)
        try:
            fork = store.read_run().get(FORK_KEY)
            refs = _needed(store, fork) if fork else []
        except (ReplayError, KeyError, TypeError, AttributeError):
            continue
        needed |= {ref["sha256"]: run_id for ref in refs}
    return needed


def _needed(store: RunStore, fork: dict[str, Any]) -> list[dict[str, str]]:
    first, trainings = int(fork["iteration"]), fork["trainings"]
    starts = [fork["policy"], *filter(None, [fork["predictor"], fork.get("carried")])]
    has_trained = store.commit_of("training", first) is not None
    has_fitted = store.commit_of("predictor", first + len(trainings) - 1) is not None if trainings else True
    return [*([] if has_trained else starts), *([] if has_fitted else trainings)]
