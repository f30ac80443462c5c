"""Which machines and models the Megatron engine is refused for, told before a run exists; needs no Megatron."""

import json
from pathlib import Path

import pytest
from models import write_random

from moe_replay.engines import megatron_settings
from moe_replay.engines.megatron_settings import require_bridgeable, require_megatron_here
from moe_replay.errors import ConfigError
from moe_replay.sections import ResourcesConfig

ALONE = ResourcesConfig()


def with_settings(model: Path, folder: Path, **settings: object) -> Path:
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"attention_bias": True, "tie_word_embeddings": True}, "attention_bias, tie_word_embeddings"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_model_that_mbridge_would_build_otherwise_is_refused(model, tmp_path, settings, told):
    require_bridgeable(model, ALONE)
    with pytest.raises(ConfigError, match=rf"without looking at {told} of config.json.*'fsdp2'"):
        require_bridgeable(with_settings(model, tmp_path / "other", **settings), ALONE)


def test_a_model_of_a_family_that_was_not_tried_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"qwen3_moe alone, and this one is of glm4_moe.*'fsdp2'"):
        require_bridgeable(write_random(tmp_path / "glm", "glm4_moe"), ALONE)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"training_expert_parallel_size": 3}, "= 3 ranks .* 8 experts of each layer .* one of 1, 2, 4, 8"),
        ({"training_pipeline_parallel_size": 2}, "= 2 ranks .* 3 layers of this model; set it to one of 1, 3"),
    ],
    ids=str,
)
def test_ranks_that_cannot_share_out_a_model_are_refused(model, sizes, told):
    with pytest.raises(ConfigError, match=told):
        require_bridgeable(model, ResourcesConfig(training_world_size=6, **sizes))


def test_what_the_machine_lacks_is_named(monkeypatch):
    lacks = {"megatron", "mbridge"}
    monkeypatch.setattr(megatron_settings.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(megatron_settings, "find_spec", lambda name: None if name in lacks else object())
    with pytest.raises(ConfigError, match=r"takes megatron-core and mbridge, which this machine has not.*'fsdp2'"):
        require_megatron_here()
    lacks.clear()
    require_megatron_here()
    monkeypatch.setattr(megatron_settings.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="takes a GPU, which"):
        require_megatron_here()
