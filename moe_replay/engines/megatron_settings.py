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
from moe_replay.sections import TrainingConfig


def require_megatron(folder: Path) -> None:
    """Raise ConfigError where Megatron can't train the model in `folder`: what is missing here, or unlike mbridge's."""
    if missing := missing_here():
        raise ConfigError(
            f"training.engine = 'megatron' takes {' and '.join(missing)}, which this machine has not; install the "
            "extra `megatron` and Transformer Engine where there is a GPU, or set training.engine = 'fsdp2'"
        )
    require_bridgeable(folder)


def missing_here() -> list[str]:
    """What mbridge needs to build a model and this machine has not."""
    packages = {"megatron": "megatron-core", "mbridge": "mbridge", "transformer_engine": "transformer-engine"}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    return missing if torch.cuda.is_available() else ["a GPU", *missing]


def require_bridgeable(folder: Path) -> None:
    """Raise ConfigError for a model that mbridge would build otherwise than transformers does, without saying so."""
    config = model_config(folder)
    if config.model_type != "qwen3_moe":
        raise ConfigError(
            f"training.engine = 'megatron' is tested with models of the family qwen3_moe alone, and this one is of "
            f"{config.model_type}; set training.engine = 'fsdp2', or choose another model"
        )
    rotary = config.rope_parameters or {}
    ignored = {
        "mlp_only_layers": bool(config.mlp_only_layers),
        "decoder_sparse_step": config.decoder_sparse_step != 1,
        "attention_bias": bool(config.attention_bias),
        "use_sliding_window": bool(config.use_sliding_window),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "rope_parameters": rotary.get("rope_type", "default") != "default",
    }
    if told := [name for name, is_set in ignored.items() if is_set]:
        raise ConfigError(
            f"mbridge builds Qwen3-MoE models without looking at {', '.join(told)} of config.json, which this model "
            "has set: Megatron would train another model; set training.engine = 'fsdp2'"
        )


def engine_config(folder: Path, training: TrainingConfig) -> Any:
    """verl's `McoreEngineConfig` for the model in the folder, on one rank."""
    from verl.workers.config import EngineRouterReplayConfig, McoreEngineConfig

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = McoreEngineConfig(
        vanilla_mbridge=True,
        use_remove_padding=True,
        # Its state is cut by bytes, not by parameters; one rank has nothing to share out.
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
