"""What verl is told of a run's training: model, engine, optimizer and policy loss, in verl's own configs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moe_replay.engines.adapters import adapter_settings
from moe_replay.errors import ConfigError
from moe_replay.methods import Method
from moe_replay.sections import ResourcesConfig, TrainingConfig

_FOREVER = 1 << 30


def worker_config(model: Path, training: TrainingConfig, resources: ResourcesConfig) -> Any:
    """verl's `TrainingWorkerConfig` of the replaying engine around the Hugging Face model in the folder `model`.

    Raises ConfigError when the attention, or engine, asked for is not installed, and as `adapter_settings`.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import TrainingWorkerConfig

    from moe_replay.engines.observed_passes import MODEL_TYPE

    is_megatron = training.engine == "megatron"
    engine, optimizer = _megatron(model, training, resources) if is_megatron else _fsdp2(training, resources)
    return TrainingWorkerConfig(
        model_type=MODEL_TYPE,
        model_config=model_config(model, training, resources),
        engine_config=engine,
        optimizer_config=optimizer,
        checkpoint_config=CheckpointConfig(save_contents=[], load_contents=[]),
    )


def _megatron(model: Path, training: TrainingConfig, resources: ResourcesConfig) -> tuple[Any, Any]:
    from moe_replay.engines import megatron_settings

    megatron_settings.require_megatron_here()
    megatron_settings.require_bridgeable(model, resources)
    from moe_replay.engines import megatron_engine  # noqa: F401 (registers it, and needs the extra `megatron`)

    engine = megatron_settings.engine_config(model, training, resources)
    return engine, megatron_settings.optimizer_config(training, _FOREVER)


def _fsdp2(training: TrainingConfig, resources: ResourcesConfig) -> tuple[Any, Any]:
    from verl.utils.device import get_device_name
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig

    offload = resources.colocated and get_device_name() != "cpu"
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        model_dtype="fp32",
        mixed_precision={
            "param_dtype": {"float32": "fp32", "bfloat16": "bf16"}[training.dtype],
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        },
        ulysses_sequence_parallel_size=resources.training_sequence_parallel_size,
        use_torch_compile=False,
        param_offload=offload,
        optimizer_offload=offload,
    )
    optimizer = FSDPOptimizerConfig(
        lr=training.learning_rate,
        lr_warmup_steps=training.warmup_steps,
        total_training_steps=_FOREVER,  # the schedule is constant after the warm-up and never ends
        betas=training.adam_betas,
        weight_decay=training.weight_decay,
        clip_grad=training.max_grad_norm,
    )
    return engine, optimizer


def model_config(model: Path, training: TrainingConfig, resources: ResourcesConfig) -> Any:
    """verl's `HFModelConfig` of the model in the folder `model`; raises as `worker_config`."""
    from verl.workers.config import HFModelConfig

    return HFModelConfig(
        path=str(model),
        override_config={"attn_implementation": _attention(training, resources)},
        use_remove_padding=training.packing,
        enable_gradient_checkpointing=training.recompute,
        **adapter_settings(model, training.lora),
    )


def require_attention(training: TrainingConfig) -> None:
    """Raise ConfigError when the attention asked for can't be had on this machine."""
    if training.attention != "flash_attention_2":
        return
    from transformers.utils.import_utils import is_flash_attn_2_available

    missing = [] if torch.cuda.is_available() else ["a GPU"]
    missing += [] if find_spec("flash_attn") else ["the package flash-attn"]
    if missing or not is_flash_attn_2_available():
        raise ConfigError(
            f"training.attention = 'flash_attention_2' takes {' and '.join(missing) or 'another flash-attn'}, which a "
            "machine that trains has not; install it there, or set training.attention = 'sdpa'"
        )


def _attention(training: TrainingConfig, resources: ResourcesConfig) -> str:
    """What transformers calls the implementation."""
    require_attention(training)
    if training.attention == "sdpa" and resources.training_sequence_parallel_size > 1:
        from moe_replay.engines import ulysses_attention

        return ulysses_attention.NAME
    return training.attention


def actor_config(method: Method, sequences: int) -> Any:
    """verl's own description of the method's policy loss over one mini-step of so many sequences, of all ranks."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,  # read by verl's trainer, not by its loss
        ppo_mini_batch_size=sequences,
        ppo_micro_batch_size_per_gpu=sequences,
        use_dynamic_bsz=True,
        clip_ratio_low=method.clip_low,
        clip_ratio_high=method.clip_high,
        loss_agg_mode=method.loss_aggregation,
        policy_loss=PolicyLossConfig(loss_mode=method.policy_loss),
    )
