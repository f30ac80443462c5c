"""What verl is told of a run's training: model, engine, optimizer and policy loss, in verl's own configs."""

from pathlib import Path
from typing import Any

from moe_replay.config import TrainingConfig
from moe_replay.engines.adapters import adapter_settings
from moe_replay.methods import Method

_FOREVER = 1 << 30


def worker_config(model: Path, training: TrainingConfig) -> Any:
    """verl's `TrainingWorkerConfig` of the replaying engine around the Hugging Face model in the folder `model`."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

    from moe_replay.engines.replay_engine import MODEL_TYPE

    return TrainingWorkerConfig(
        model_type=MODEL_TYPE,
        model_config=model_config(model, training),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            mixed_precision={
                "param_dtype": {"float32": "fp32", "bfloat16": "bf16"}[training.dtype],
                "reduce_dtype": "fp32",
                "buffer_dtype": "fp32",
            },
            use_torch_compile=False,
            param_offload=False,
            optimizer_offload=False,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=training.learning_rate,
            lr_warmup_steps=training.warmup_steps,
            total_training_steps=_FOREVER,  # the schedule is constant after the warm-up and never ends
            betas=training.adam_betas,
            weight_decay=training.weight_decay,
            clip_grad=training.max_grad_norm,
        ),
        checkpoint_config=CheckpointConfig(save_contents=[], load_contents=[]),
    )


def model_config(model: Path, training: TrainingConfig) -> Any:
    """verl's `HFModelConfig` of the model in the folder `model`; raises ConfigError as `adapter_settings`."""
    from verl.workers.config import HFModelConfig

    return HFModelConfig(
        path=str(model),
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=False,
        enable_gradient_checkpointing=training.recompute,
        **adapter_settings(model, training.lora),
    )


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
