"""Every setting a run can be told: its sections, and what has to hold between them. Imports nothing heavy.

A config is sparse TOML over the defaults of `moe_replay.sections`, which are the embedded model and task.
"""

import hashlib
import json

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moe_replay.alarm import AlarmConfig, actions_for
from moe_replay.megatron_limits import require_megatron_does
from moe_replay.methods import DEFAULT_PRESET, Method
from moe_replay.sections import (
    DataConfig,
    EvaluationConfig,
    EvolutionConfig,
    ModelConfig,
    PredictorConfig,
    ResourcesConfig,
    RolloutConfig,
    StagesConfig,
    StorageConfig,
    TrackingConfig,
    TrainingConfig,
)
from moe_replay.settings import Config


class RunConfig(Config):
    """One training run."""

    seed: NonNegativeInt = 0
    """Root of every seed of the run: data order, sampling, training."""
    iterations: PositiveInt = 5
    """Rollout-and-train cycles."""
    method: Method = Field(default_factory=lambda: Method.model_validate(DEFAULT_PRESET))
    """A preset's name, or a table (see `moe_replay.methods`)."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()
    evolution: EvolutionConfig = EvolutionConfig()
    predictor: PredictorConfig = PredictorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    stages: StagesConfig = StagesConfig()
    alarm: AlarmConfig = AlarmConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> "RunConfig":
        sequences = self.rollout.prompts * self.rollout.responses
        if sequences % self.training.mini_steps:
            raise ValueError(
                f"training.mini_steps = {self.training.mini_steps} does not divide the rollout batch of "
                f"rollout.prompts * rollout.responses = {sequences} sequences; change one of the three"
            )
        of_a_step, shares = sequences // self.training.mini_steps, self.resources.training_shares
        if of_a_step % shares:
            raise ValueError(
                f"resources.training_world_size / training_sequence_parallel_size / training_pipeline_parallel_size = "
                f"{shares} does not divide the {of_a_step} sequences of a mini-step (rollout.prompts * "
                f"rollout.responses / training.mini_steps = {sequences} / {self.training.mini_steps}); change one of "
                "them"
            )
        shares = -(-sequences // (self.rollout.share or sequences))
        if self.resources.rollout_replicas > shares:
            raise ValueError(
                f"resources.rollout_replicas = {self.resources.rollout_replicas} engines have {shares} share(s) of the "
                f"rollout batch of {sequences} sequences to work on; set rollout.share to "
                f"{max(1, sequences // self.resources.rollout_replicas)} sequences or fewer, or lower the replicas"
            )
        return self

    @model_validator(mode="after")
    def _rolls_out_beside_training(self) -> "RunConfig":
        if self.rollout.one_step_off and self.resources.colocated:
            raise ValueError(
                "rollout.one_step_off = true rolls out while the trainer works, and with resources.colocated = true "
                "the two take turns on the same GPUs; set one of them to false"
            )
        if self.rollout.one_step_off and self.method.predictor and self.method.route_source == "rollout":
            raise ValueError(
                "rollout.one_step_off = true samples each batch before the training that comes before its own, and the "
                f"predictor that {self.method.label} serves rollouts with foretells one training, not two; give "
                "rollout.one_step_off = false, take r3, or predict in the old pass (method.route_source = "
                "'old_log_prob')"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> "RunConfig":
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        sharing = self.resources.training_sequence_parallel_size
        if self.training.micro_batch_tokens * sharing < longest:
            raise ValueError(
                f"training.micro_batch_tokens = {self.training.micro_batch_tokens} on "
                f"resources.training_sequence_parallel_size = {sharing} rank(s) hold no sequence of "
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens; raise one of the two"
            )
        if sharing > 1 and not self.training.packing:
            raise ValueError(
                f"resources.training_sequence_parallel_size = {sharing} cuts packed micro-batches into equal parts; "
                "set training.packing = true"
            )
        if self.training.attention == "flash_attention_2" and self.training.dtype != "bfloat16":
            raise ValueError(
                "training.attention = 'flash_attention_2' computes in bfloat16, and training.dtype = "
                f"{self.training.dtype!r}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _engine_does_what_is_asked(self) -> "RunConfig":
        if self.training.engine == "megatron":
            require_megatron_does(self.method, self.rollout, self.training, self.resources)
            return self
        for key in ("training_expert_parallel_size", "training_pipeline_parallel_size"):
            if (ranks := getattr(self.resources, key)) > 1:
                raise ValueError(
                    f"resources.{key} = {ranks} is for training.engine = 'megatron', and it is 'fsdp2', which shards "
                    "weights instead; set one of the two"
                )
        return self

    @model_validator(mode="after")
    def _samples_are_of_benchmarks(self) -> "RunConfig":
        if unknown := sorted(self.evaluation.samples_of.keys() - self.evaluation.benchmarks.keys()):
            raise ValueError(
                f"evaluation.samples_of names {', '.join(unknown)}, which is no benchmark; known are "
                f"{', '.join(self.evaluation.benchmarks) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _has_evolution_to_record(self) -> "RunConfig":
        if self.records_evolution and self.training.mini_steps < 2:
            raise ValueError(
                f"training.mini_steps = {self.training.mini_steps}, and router evolution is what mini-steps 2 to κ "
                "see; raise it, or take a method without a predictor and evolution.record = false"
            )
        if self.records_evolution and self.evolution.tokens < self.training.mini_steps - 1:
            raise ValueError(
                f"evolution.tokens = {self.evolution.tokens} leaves mini-steps 2 to {self.training.mini_steps} without "
                f"a token each; give {self.training.mini_steps - 1} at least"
            )
        return self

    @model_validator(mode="after")
    def _has_where_to_fall_back_to(self) -> "RunConfig":
        if self.alarm.rule == "fall_back" and "fall_back" not in actions_for(self.method):
            raise ValueError(
                f"alarm.rule = 'fall_back' trains under the routes of the rollout, which {self.method.label} replays "
                "already; take skip, lower_lr or pause, or a method that replays others or none"
            )
        return self

    @property
    def records_evolution(self) -> bool:
        """Whether training keeps router evolution."""
        return self.method.predictor or self.evolution.record

    def digest(self, *sections: str) -> str:
        """sha256 of the named sections: what a stage's output depends on, besides its inputs."""
        # The root is where a run lies, not what it is: a copied run stays the same run. Defaults are left out, so that
        # a run goes on under a version that knows more keys.
        root = {"storage": {"root"}}
        changed = self.model_dump(mode="json", include=set(sections), exclude=root, exclude_defaults=True)
        chosen = {section: settings for section, settings in changed.items() if settings != {}}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def evaluates(self, iteration: int) -> bool:
        """Whether the policy is scored after this iteration (counted from 0)."""
        last = iteration == self.iterations - 1
        return bool(self.evaluation.benchmarks) and (last or (iteration + 1) % self.evaluation.every == 0)
