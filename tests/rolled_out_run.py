"""A run of which one rollout and its routes are committed, as the command line finds it."""

import json
from pathlib import Path

import numpy as np

from moe_replay import tiny
from moe_replay.config_reading import load_config
from moe_replay.data import addition
from moe_replay.engines.process import no_progress
from moe_replay.preparation import prepare
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.routes import archive_routes
from moe_replay.stages.run import Run
from moe_replay.stages.samples import Sample, write_samples


def rolled_out(folder: Path) -> Run:
    """Make it in an empty folder, its root `runs` below that."""
    model = folder / "model"
    model.mkdir()
    tiny.build_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 8}))
    addition.write_parquet(folder / "train.parquet", addition.split_problems(8, 1, seed=0).train, "train")
    (folder / "run.toml").write_text(
        f'[model]\npath = "{model}"\n[data]\ntrain = "{folder / "train.parquet"}"\n[evaluation]\nbenchmarks = {{}}\n'
        f'[storage]\nroot = "{folder / "runs"}"\n'
    )
    made = prepare(load_config(folder / "run.toml"), "run-1", no_progress)
    writer = made.store().begin("rollout", 0, {"policy": made.initial_policy}, made.digest("rollout"))
    write_samples(writer, [sample(number) for number in range(6)])
    origin = {"source": "vllm", "engine_version": "0.28.0", "dtype": "bfloat16", "weights_sha256": made.model_sha256}
    rollout = writer.commit(attributes={**origin, "layers": [0, 2], "num_experts": 8, "top_k": 2})
    archive_routes(made, 0, rollout)
    return made


def sample(number: int) -> Sample:
    """3 prompt tokens, 2 sampled; routes of all but the last."""
    ids_RLK = np.random.default_rng(number).random((4, 2, 8)).argsort(-1)[..., :2]
    return Sample(
        sequence_id=number,
        prompt_row=number,
        group=0,
        data_source=addition.DATA_SOURCE,
        prompt_ids=[1, 2, 3],
        response_ids=[4, 5],
        log_probs=[-1.0, -2.0],
        text="45",
        reward=0.0,
        truncated=True,
        trace=RoutingTrace.from_capture(ids_RLK, 5, 8, [0, 2]),
    )
