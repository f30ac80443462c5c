"""Train the first iteration of a run whose rollout and routes are committed, on an engine without free memory.

Called as `training_without_memory.py ROOT RUN SETTINGS`, settings as a JSON object of dotted keys.
"""

import json
import sys

from prefect import flow

from moe_replay.archive.commits import ArtifactRef
from moe_replay.config_reading import load_config
from moe_replay.engines.process import Progress, no_progress
from moe_replay.environment import set_defaults
from moe_replay.preparation import prepare
from moe_replay.stages.run import Run
from tasks.engines import engines_of
from tasks.stages import configured, train_replayed

FREE_BYTES = 5_000_000
"""Enough for what is small; gradients and the optimizer's state take twice as much."""


@flow(name="train-once", persist_result=False)
def train_once(run: Run) -> ArtifactRef:
    """The training stage alone."""
    rollout, routes = (run.store().commit_of(stage, 0) for stage in ("rollout", "routes"))
    return configured(train_replayed, run.config.stages)(run, 0, run.initial_policy, rollout, routes)


def leave_memory_to_train(engine: object, progress: Progress, run: Run) -> None:
    """Limit the engine's memory, once what its inputs are read with is loaded and compiled."""
    from memory_calls import leave_memory

    from moe_replay.archive.routes import RouteArchive
    from moe_replay.stages.samples import read_answers

    rollout, routes = (run.store().committed(stage, 0) for stage in ("rollout", "routes"))
    read_answers(rollout)
    archive = RouteArchive.open(routes)
    archive.read_sequences(0, archive.num_sequences)
    leave_memory(engine, progress, FREE_BYTES)


if __name__ == "__main__":
    set_defaults()
    root, run_id, settings = sys.argv[1:]
    run = prepare(load_config(None, {**json.loads(settings), "storage.root": root}), run_id, no_progress)
    try:
        engines_of(run).training().call("training_without_memory:leave_memory_to_train", no_progress, run)
        print(train_once(run).model_dump_json())
    finally:
        engines_of(run).close()
