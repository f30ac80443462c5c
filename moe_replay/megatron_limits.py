"""What a run trained by verl's Megatron engine can't ask for, told from its config alone. Imports nothing heavy."""

from moe_replay.methods import Method
from moe_replay.sections import ResourcesConfig, RolloutConfig, TrainingConfig


def require_megatron_does(
    method: Method, rollout: RolloutConfig, training: TrainingConfig, resources: ResourcesConfig
) -> None:
    """Raise ValueError for the first of these settings that `training.engine = "megatron"` has nothing for."""
    refusals = (
        (
            training.lora.rank > 0,
            f"trains all weights, and training.lora.rank = {training.lora.rank} asks for adapters; set it to 0",
        ),
        (not training.packing, "takes packed micro-batches alone; set training.packing = true"),
        (
            training.attention != "sdpa",
            f"has attention of its own (Transformer Engine's), not training.attention = {training.attention!r}; leave "
            "that out",
        ),
        (
            resources.training_sequence_parallel_size > 1,
            "has no sequences shared among ranks here, and resources.training_sequence_parallel_size = "
            f"{resources.training_sequence_parallel_size}; set it to 1",
        ),
        (
            resources.colocated,
            "does not leave the GPU between its stages here, as resources.colocated = true asks; set that to false",
        ),
        (
            method.predictor and method.route_source == "old_log_prob",
            f"does not route under a predictor, as the old pass of {method.label} does; take pr2, whose rollout does",
        ),
        (
            rollout.partial_response_tokens is not None and method.route_source == "rollout",
            f"replays every row of a sequence, and rollout.partial_response_tokens = {rollout.partial_response_tokens} "
            f"leaves rows without routes where stretches meet, which {method.label} replays; set it to none, or take "
            "r2 or a method without replay",
        ),
    )
    told = next((what for is_so, what in refusals if is_so), None)
    if told:
        raise ValueError(f"training.engine = 'megatron' {told}, or set training.engine = 'fsdp2'")
