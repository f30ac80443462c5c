"""What a config.json declares, against what the model that is built from it has."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import _COMMON, CONFIGS, MOE_LAYERS
from transformers import AutoConfig

from moe_replay.errors import ConfigError
from moe_replay.routing.declared import declared_routers
from moe_replay.routing.model_shape import router_shape

QWEN = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
PLACED = [
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 2}),
    ("deepseek_v4", {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}),
    ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_interval": 2}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
    ("afmoe", {"num_dense_layers": 2}),
    ("jamba", {"expert_layer_offset": 0}),
]


def write_config(folder: Path, family: str, **overrides: Any) -> Path:
    """As transformers saves it."""
    AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family], **overrides}).save_pretrained(folder)
    return folder


def write_json(folder: Path, document: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(("family", "overrides"), [*((family, {}) for family in MOE_LAYERS), *PLACED])
def test_a_config_declares_the_routers_that_the_model_has(family, overrides, tmp_path):
    folder = write_config(tmp_path, family, **overrides)
    declared, built = declared_routers(folder), router_shape(folder)
    assert (declared.layers, declared.num_experts, declared.top_k) == built[:3]
    assert declared.hidden_size == _COMMON["hidden_size"]
    assert declared == declared_routers(folder / "config.json")


def test_a_language_model_inside_another_is_found(tmp_path):
    path = write_json(tmp_path, {"model_type": "qwen3_vl_moe", "hidden_size": 7, "text_config": QWEN})
    assert declared_routers(path)[:5] == ("qwen3_moe", (0, 1, 2, 3), 8, 2, 32)


def test_experts_in_every_other_layer_by_frequency_or_by_flags(tmp_path):
    deepseek = {**QWEN, "model_type": "deepseek_v3", "first_k_dense_replace": 1}
    assert declared_routers(write_json(tmp_path, {**deepseek, "moe_layer_freq": 2})).layers == (2,)
    assert declared_routers(write_json(tmp_path, {**deepseek, "moe_layer_freq": [1, 0, 1, 1]})).layers == (2, 3)


def test_layers_of_a_hybrid_are_counted_by_its_pattern(tmp_path):
    hybrid = {**QWEN, "model_type": "nemotron_h", "hybrid_override_pattern": "ME*EM"}
    assert declared_routers(write_json(tmp_path, hybrid))[1:2] == ((1, 3),)
    assert declared_routers(write_json(tmp_path, hybrid)).decoder_layers == 5


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 32}, "is dense"),
        ({**QWEN, "mlp_only_layers": [0, 1, 2, 3]}, "none of its 4 layers"),
        ({**QWEN, "model_type": "phimoe"}, "makes no top-k call"),
        ({**QWEN, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}, "can't be replayed"),
        ({**QWEN, "model_type": "newmoe"}, "not in which layers"),
        ({**QWEN, "model_type": "newmoe", "moe_layer_freq": [1, 0]}, "which of 4 layers"),
        ({**QWEN, "num_experts_per_tok": 9}, "9 of 8 experts"),
        ({**QWEN, "hidden_size": None}, "none of hidden_size"),
        ([QWEN], "not a JSON object"),
    ],
)
def test_a_config_that_does_not_say_is_refused(document, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        declared_routers(write_json(tmp_path, document))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json can't be read"):
        declared_routers(tmp_path)
