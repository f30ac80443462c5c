"""What verl's Megatron engine is told of a run's training, and whether it can train a model here.

The bridge between Megatron's weights and Hugging Face's is mbridge (verl's `vanilla_mbridge`): the newest
Megatron-Bridge that Python 3.11 can have (0.3.1) imports Transformer Engine for LoRA whether it is there or not, and
asks for a transformers before 5.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moe_replay.errors import ConfigError
from moe_replay.routing.model_shape import model_config
from moe_replay.sections import ResourcesConfig, TrainingConfig


def require_megatron_trains(folder: Path, resources: ResourcesConfig) -> None:
    """Raise ConfigError before a run exists: as `require_bridgeable`, or for what is missing if it trains here."""
    require_bridgeable(folder, resources)
    if resources.training_world_size == 1:  # else elsewhere, perhaps
        require_megatron_here()


def require_megatron_here() -> None:
    """Raise ConfigError where this machine lacks something that Megatron takes."""
    if missing := missing_here():
        raise ConfigError(
            f"training.engine = 'megatron' takes {' and '.join(missing)}, which this machine has not; install the "
            "extra `megatron` and Transformer Engine where there is a GPU, or set training.engine = 'fsdp2'"
        )


def missing_here() -> list[str]:
    """What mbridge needs to build a model and this machine has not."""
    packages = {"megatron": "megatron-core", "mbridge": "mbridge", "transformer_engine": "transformer-engine"}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    return missing if torch.cuda.is_available() else ["a GPU", *missing]


def require_bridgeable(folder: Path, resources: ResourcesConfig) -> None:
    """Raise ConfigError for a model that mbridge would build otherwise than transformers does, without saying so.

    And for one whose layers or experts the ranks can't share out evenly.
    """
    config = model_config(folder)
    if config.model_type != "qwen3_moe":
        raise ConfigError(
            "training.engine = 'megatron' is tested with models of the family qwen3_moe alone, and this one is of "
            f"{config.model_type}; set training.engine = 'fsdp2', or choose another model"
        )
    if told := _overlooked(config):
        raise ConfigError(
            f"mbridge builds Qwen3-MoE models without looking at {', '.join(told)} of config.json, which this model "
            "has set: Megatron would train another model; set training.engine = 'fsdp2'"
        )
    for key, parts, of_what in (
        ("training_expert_parallel_size", config.num_experts, "experts of each layer"),
        ("training_pipeline_parallel_size", config.num_hidden_layers, "layers"),
    ):
        if parts % (ranks := getattr(resources, key)):
            fitting = [n for n in range(1, parts + 1) if parts % n == 0]
            raise ConfigError(
                f"resources.{key} = {ranks} ranks take equal shares of the {parts} {of_what} of this model; set it to "
                f"one of {', '.join(map(str, fitting))}"
            )


def _overlooked(config: Any) -> list[str]:
    """What mbridge's Qwen3-MoE does not look at and this one has set."""
    is_set = {
        "mlp_only_layers": bool(config.mlp_only_layers),
        "decoder_sparse_step": config.decoder_sparse_step != 1,
        "attention_bias": bool(config.attention_bias),
        "use_sliding_window": bool(config.use_sliding_window),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "rope_parameters": (config.rope_parameters or {}).get("rope_type", "default") != "default",
    }
    return [name for name, so in is_set.items() if so]


def engine_config(folder: Path, training: TrainingConfig, resources: ResourcesConfig) -> Any:
    """verl's `McoreEngineConfig` for the model in the folder."""
    from verl.workers.config import EngineRouterReplayConfig, McoreEngineConfig

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = McoreEngineConfig(
        vanilla_mbridge=True,
        use_remove_padding=True,
        expert_model_parallel_size=resources.training_expert_parallel_size,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=resources.training_pipeline_parallel_size,
        # Its state is cut by bytes, not by parameters, and could not be kept by their names.
        use_distributed_optimizer=False,
        router_replay=EngineRouterReplayConfig(mode="R3"),
        override_transformer_config={
            # mbridge takes it that weights are normalised over the chosen experts.
            "moe_router_pre_softmax": not model_config(folder).norm_topk_prob,
            **(recompute if training.recompute else {}),
        },
    )
    # verl's config refuses float32, which its engine knows how to build.
    object.__setattr__(config, "dtype", training.dtype)
    return config


def optimizer_config(training: TrainingConfig, total_steps: int) -> Any:
    """verl's `McoreOptimizerConfig` of a constant learning rate after the warm-up."""
    from verl.workers.config import McoreOptimizerConfig

    first, second = training.adam_betas
    return McoreOptimizerConfig(
        lr=training.learning_rate,
        lr_warmup_steps=training.warmup_steps,
        lr_decay_style="constant",
        total_training_steps=total_steps,
        weight_decay=training.weight_decay,
        clip_grad=training.max_grad_norm,
        # verl hands on no betas of its own config.
        override_optimizer_config={"adam_beta1": first, "adam_beta2": second},
    )
