"""Which models of transformers' families may be packed, and be shared out between ranks, from their configs alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, MOE_LAYERS, config_of
from transformers import AutoModelForCausalLM

from moe_replay.engines.packable import require_packable
from moe_replay.errors import ConfigError
from moe_replay.routing.model_shape import empty_model
from moe_replay.sections import ResourcesConfig, TrainingConfig

MIXED = {
    "deepseek_v4": r"\[0, 1, 2\] of this model are heavily_compressed_attention",
    "jamba": r"\[1\] of this model are mamba",
    "minimax": r"\[1\] of this model are linear_attention",
    "qwen3_next": r"\[0, 2\] of this model are linear_attention",
}


def check(folder: Path, family: str, ranks: int = 1, training: dict[str, Any] | None = None, **changes: Any) -> None:
    config_of(family, **changes).save_pretrained(folder)
    resources = ResourcesConfig(training_world_size=ranks, training_sequence_parallel_size=ranks)
    require_packable(empty_model(folder), TrainingConfig(packing=True, **(training or {})), resources)


MASKED_WITHOUT_POSITIONS = {"afmoe": "AfmoeModel", "gpt_oss": "GptOssModel"}


@pytest.mark.parametrize("family", sorted(MOE_LAYERS.keys() - MIXED.keys() - MASKED_WITHOUT_POSITIONS.keys()))
def test_families_of_attention_alone_are_packed(tmp_path: Path, family: str) -> None:
    check(tmp_path, family)


@pytest.mark.parametrize("family", sorted(MIXED))
def test_layers_that_would_run_on_from_one_sequence_into_the_next_are_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(ConfigError, match=MIXED[family] + r", which would.* set training\.packing = false"):
        check(tmp_path, family)


@pytest.mark.parametrize("family", sorted(MASKED_WITHOUT_POSITIONS))
def test_masks_that_are_made_without_positions_are_refused(tmp_path: Path, family: str) -> None:
    told = rf"{MASKED_WITHOUT_POSITIONS[family]} makes its masks without them.* set training\.packing = false"
    with pytest.raises(ConfigError, match=told):
        check(tmp_path, family)
    check(tmp_path, family, training={"attention": "flash_attention_2"})


@pytest.mark.parametrize("family", ["afmoe", "deepseek_v3", "gemma4_text", "longcat_flash", "olmoe", "qwen3_moe"])
def test_a_packed_sequence_gives_what_it_gives_alone_unless_it_is_refused(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    one, line, positions = torch.tensor([[8, 9, 10, 11]]), [[5, 6, 7, 8, 9, 10, 11]], [[0, 1, 2, 0, 1, 2, 3]]
    with torch.no_grad():
        alone = model(input_ids=one, use_cache=False).logits
        packed = model(
            input_ids=torch.tensor(line), position_ids=torch.tensor(positions), attention_mask=None, use_cache=False
        ).logits[:, 3:]
    is_mixed = float((alone - packed).abs().max()) > 1e-3
    assert is_mixed == (family in MASKED_WITHOUT_POSITIONS)


def test_of_a_family_whose_mixers_are_layers_only_those_that_attend_are_packed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[2\] of this model are mamba"):
        check(tmp_path, "nemotron_h", layers_block_type=["attention", "moe", "mamba", "moe"])


def test_a_mixer_beside_attention_is_found_where_the_config_names_no_kinds(tmp_path: Path) -> None:
    changes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match=r"decoder layers \[0, 1\] of this model are "):
        check(tmp_path, "falcon_h1", **changes)


def test_an_indexer_of_sparse_attention_chooses_among_the_whole_line_and_is_refused(tmp_path: Path) -> None:
    latent = {name: CONFIGS["deepseek_v3"][name] for name in ("q_lora_rank", "kv_lora_rank", "num_key_value_heads")}
    with pytest.raises(ConfigError, match=r"decoder layers \[0, 1, 2\] of this model are GlmMoeDsaIndexer"):
        check(tmp_path, "glm_moe_dsa", n_routed_experts=8, **latent)


def test_chunks_of_attention_hold_a_whole_line_or_are_refused(tmp_path: Path) -> None:
    check(tmp_path, "llama4_text", training={"micro_batch_tokens": 64}, attention_chunk_size=64)
    with pytest.raises(ConfigError, match=r"a line of 65 tokens .* chunks of 64; set training\.packing = false"):
        check(tmp_path, "llama4_text", training={"micro_batch_tokens": 65}, attention_chunk_size=64)


@pytest.mark.parametrize(("heads", "of_keys", "ranks"), [(8, 2, 4), (8, 4, 2), (8, 8, 8), (8, 1, 8)])
def test_heads_are_shared_out_evenly(tmp_path: Path, heads: int, of_keys: int, ranks: int) -> None:
    check(tmp_path, "qwen3_moe", ranks, num_attention_heads=heads, num_key_value_heads=of_keys)


def test_heads_of_keys_that_ranks_cannot_share_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"= 3 ranks.* A = 6, .* its 2 key/value heads .* set it to one of 1, 2, 6"):
        check(tmp_path, "qwen3_moe", 3, num_attention_heads=6, num_key_value_heads=2)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"= 8 ranks.* A = 4, .* its 2 key/value heads .* set it to one of 1, 2, 4"):
        check(tmp_path, "qwen3_moe", 8)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_shared_sequences_are_attended_to_whole_without_flash_attention(tmp_path: Path, family: str) -> None:
    with pytest.raises(ConfigError, match=r"\[0.*2\] of this model are (chunked|sliding)_attention; .*flash_attention"):
        check(tmp_path, family, 2, {"micro_batch_tokens": 64})
    check(tmp_path, family, 2, {"micro_batch_tokens": 64, "attention": "flash_attention_2"})
