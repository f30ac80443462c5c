import json

import pytest

from moe_replay import tiny
from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config
from moe_replay.data import addition


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    """A run of a user's own model and data, all below `tmp_path`."""
    monkeypatch.setenv("MOE_REPLAY_HOME", str(tmp_path / "home"))
    model = tmp_path / "model"
    tiny.build_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 8}))
    (model / "model.safetensors").write_bytes(b"weights")
    split = addition.split_problems(16, 4, seed=0)
    addition.write_parquet(tmp_path / "train.parquet", split.train, "train")
    addition.write_parquet(tmp_path / "test.parquet", split.benchmark, "test")
    return load_config(
        None,
        {
            "model.path": str(model),
            "data.train": str(tmp_path / "train.parquet"),
            "evaluation.benchmarks": {"addition": str(tmp_path / "test.parquet")},
            "storage.root": str(tmp_path / "runs"),
        },
    )
