"""What runs still need of those that they were forked from, which gc leaves alone."""

from typing import Any

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import FORK_KEY
from moe_replay.archive.leftovers import runs_under
from moe_replay.errors import ReplayError


def needed_by_forks(root: str) -> dict[str, str]:
    """sha256 of each artifact that a run under `root` still starts from, and that run's id.

    A fork needs `needed_starts`, and the source's trainings until it has fitted from as many of its own. A run whose
    document is damaged can't say what it needs.
    """
    needed: dict[str, str] = {}
    for run_id in runs_under(root):
        store = RunStore(root, run_id)
        try:
            document = store.read_run()
            refs = _needed(store, document[FORK_KEY], document["config"]) if FORK_KEY in document else []
        except (ReplayError, KeyError, TypeError, AttributeError):
            continue
        needed |= {ref["sha256"]: run_id for ref in refs}
    return needed


def needed_starts(store: RunStore, first: int, rolls_out_ahead: bool) -> tuple[str, ...]:
    """Which of a fork's `policy`, `predictor` and `carried` rollout the run still starts from.

    All until its `first` iteration is trained, and the policy until the next has rolled out where that
    `rolls_out_ahead`: one step off it is of the same policy.
    """
    if store.commit_of("training", first) is None:
        return ("policy", "predictor", "carried")
    return ("policy",) if rolls_out_ahead and store.commit_of("rollout", first + 1) is None else ()


def _needed(store: RunStore, fork: dict[str, Any], config: dict[str, Any]) -> list[dict[str, str]]:
    first, trainings = int(fork["iteration"]), fork["trainings"]
    rolls_out_ahead = config["rollout"].get("one_step_off", False) and config["iterations"] > first + 1
    starts = [ref for name in needed_starts(store, first, rolls_out_ahead) if (ref := fork.get(name))]
    has_fitted = store.commit_of("predictor", first + len(trainings) - 1) is not None if trainings else True
    return [*starts, *([] if has_fitted else trainings)]
