"""The sections of a run's config, each documented where it is declared. Imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from moe_replay.errors import ConfigError
from moe_replay.lora import LoraConfig
from moe_replay.settings import NONE, Config

EMBEDDED = "embedded"
"""Stands for the tiny model, its training problems or its benchmark, all made on the spot."""
EMBEDDED_TOP_4 = "embedded-top-4"
"""Stands for a second tiny model, of 32 experts with 4 to a token."""

Dtype = Literal["float32", "bfloat16"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Config):
    """The policy to train."""

    path: str = EMBEDDED
    """A folder or hub name of a Hugging Face Mixture-of-Experts model, `embedded` or `embedded-top-4`."""


class DataConfig(Config):
    """The problems to train on."""

    train: str = EMBEDDED
    """A Parquet file in verl's schema (prompt, data_source, reward_model, extra_info), or `embedded`."""


class RolloutConfig(Config):
    """How vLLM samples responses."""

    prompts: PositiveInt = 32
    """Prompts trained on per iteration."""
    responses: int = Field(default=8, ge=2)
    """Responses sampled per prompt: the group over which GRPO normalises rewards."""
    max_prompt_tokens: PositiveInt = 32
    """Longer prompts are refused, never cut."""
    max_response_tokens: PositiveInt = 8
    """A response that reaches this length without ending counts as truncated."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs of both engines are taken at it."""
    dtype: Dtype = "bfloat16"
    """Precision of the inference engine."""
    gate_dtype: Literal["engine", "float32"] = "engine"
    """Precision of the inference engine's routers: its own, or float32, in which small predictions survive."""
    share: PositiveInt | None = None
    """Sequences that an engine samples at a time, by default all of a stage. Which ones are sampled together decides
    how sums are rounded: results depend on it, and on nothing else of how replicas share out the work."""
    partial_response_tokens: PositiveInt | None = None
    """Partial rollouts: tokens by which responses grow before it is looked at which prompts have all theirs. As soon as
    `prompts` have, the rollout ends, and what is unfinished goes on in the next iteration, under its weights. Less than
    `max_response_tokens`. By default every response is sampled to its end."""
    oversampled_prompts: NonNegativeInt = 0
    """Prompts that partial rollouts have at work beside `prompts`: as many are carried into the next iteration, at most
    those that the data has."""
    one_step_off: bool = False
    """Roll out the next batch beside the training of this one, under the weights that this training starts from, so
    that from the second batch on each is one update staler. By default a rollout waits for the update before it."""
    memory_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of a GPU's memory that vLLM may take; the rest is the trainer's, unless they take turns
    (resources.colocated). Has no effect on a CPU."""

    def require_unfinished(self) -> None:
        """Raise ConfigError for partial rollouts that leave nothing unfinished; runs that began so go on."""
        stretch, longest = self.partial_response_tokens, self.max_response_tokens
        if stretch is not None and stretch >= longest:
            raise ConfigError(
                f"rollout.partial_response_tokens = {stretch} lets every response reach its end, at most "
                f"rollout.max_response_tokens = {longest}, in one round, so that none is ever left unfinished and "
                "batches only get older; set it below, or turn partial rollouts off (none, and "
                "rollout.oversampled_prompts = 0)"
            )

    @model_validator(mode="after")
    def _carries_what_is_partial(self) -> "RolloutConfig":
        if (self.partial_response_tokens is not None) != (self.oversampled_prompts > 0):
            raise ValueError(
                f"partial_response_tokens = {self.partial_response_tokens or NONE} and oversampled_prompts = "
                f"{self.oversampled_prompts}: partial rollouts need both, for without prompts beside those that are "
                "trained on nothing can be left unfinished; give both, or neither (none and 0)"
            )
        return self


class TrainingConfig(Config):
    """How verl updates the policy."""

    engine: Literal["fsdp2", "megatron"] = "fsdp2"
    """verl's training engine. `megatron` takes a GPU, the extra `megatron`, Transformer Engine and a Qwen3-MoE model,
    and has not been run on a GPU yet (docs/distributed.md)."""
    mini_steps: PositiveInt = 4
    """κ: optimizer steps per rollout batch, each on prompts * responses / κ sequences."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises from 0."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens per forward pass; verl packs sequences into micro-batches up to it. Where memory does not do for as many,
    the stage is retried with half of them, down to the longest sequence."""
    recompute: bool = False
    """Recompute activations in backward instead of keeping them."""
    packing: bool = False
    """Put the sequences of a micro-batch end to end instead of padding them to the longest: no row is computed in vain.
    Where attention is `sdpa` its mask takes micro_batch_tokens² bytes, so this is for `flash_attention_2`, and for
    `megatron`, which takes packed sequences alone and brings its own attention."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Implementation of attention; `flash_attention_2` takes a GPU, bfloat16 and the package flash-attn."""
    dtype: Dtype = "float32"
    """Precision of the trainer's forward and backward; weights and optimizer stay float32, but under `megatron`, which
    gives away bfloat16 weights and keeps their float32 originals with the optimizer's state."""
    lora: LoraConfig = LoraConfig()


class ResourcesConfig(Config):
    """On how much hardware a run computes. Results do not depend on it, but for the order in which sums are rounded."""

    training_world_size: PositiveInt = 1
    """Ranks that share out the training of each mini-batch, each with a GPU, or a CPU where there is none. One works in
    the run's own process; more run under Ray, in the cluster that RAY_ADDRESS names or in one of this machine."""
    training_sequence_parallel_size: PositiveInt = 1
    """Ranks that share out the tokens of one micro-batch, and the heads of its attention (DeepSpeed-Ulysses,
    arXiv 2309.14509), so that longer sequences fit; must divide training_world_size and needs training.packing."""
    training_expert_parallel_size: PositiveInt = 1
    """Ranks that share out the experts of each layer, each with sequences of its own, under `megatron`."""
    training_pipeline_parallel_size: PositiveInt = 1
    """Ranks that share out the layers of the model, all with the same sequences, under `megatron`. Times
    training_expert_parallel_size it must divide training_world_size."""
    rollout_replicas: PositiveInt = 1
    """vLLM engines that take shares (rollout.share) of rollout and evaluation as they are free; more than one run under
    Ray, like ranks of training."""
    rollout_tensor_parallel_size: PositiveInt = 1
    """GPUs of one machine, or processes on a CPU, that one vLLM engine is spread over."""
    colocated: bool = False
    """Rollout and training take turns on the same GPUs of one machine: vLLM sleeps while the trainer works, and the
    trainer's weights and optimizer wait in host memory while vLLM does. Has no effect on a CPU."""

    @model_validator(mode="after")
    def _sequences_are_shared_evenly(self) -> "ResourcesConfig":
        ranks, sharing = self.training_world_size, self.training_sequence_parallel_size
        if ranks % sharing:
            raise ValueError(
                f"training_sequence_parallel_size = {sharing} does not divide training_world_size = {ranks}; "
                "change one of the two"
            )
        experts, stages = self.training_expert_parallel_size, self.training_pipeline_parallel_size
        if ranks % (experts * stages):
            raise ValueError(
                f"training_expert_parallel_size * training_pipeline_parallel_size = {experts} * {stages} does not "
                f"divide training_world_size = {ranks}; change one of the three"
            )
        return self

    @property
    def training_shares(self) -> int:
        """Parts that each mini-batch of training is cut into, each for one rank or for those that share sequences."""
        return self.training_world_size // self.training_sequence_parallel_size // self.training_pipeline_parallel_size


class EvolutionConfig(Config):
    """What training keeps of router evolution: hidden states and logits before the update, and logits after."""

    tokens: PositiveInt = 4096
    """Token positions kept per iteration, of mini-steps 2 to κ; each takes L * (H * 2 or 4 + 8 E) bytes."""
    dtype: Dtype = "bfloat16"
    """Precision of the hidden states kept; logits stay float32, since their drift is a small difference."""
    record: bool = False
    """Keep it under methods without a predictor too, so that predictors can be fitted and judged offline."""


class PredictorConfig(Config):
    """How the evolution predictors W_p are fitted, and where they are used."""

    objective: Literal["ridge", "post_routing_kl", "delta_kl"] = "ridge"
    """Ridge regression of the centred logit drift, in closed form; or one of PR2's two divergences, minimised."""
    ridge: PositiveFloat = 0.1
    """Weight of ‖W_p‖²/2, in units of the mean diagonal of the objective's Hessian at W_p = 0."""
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    """What minimises a divergence."""
    steps: PositiveInt = 100
    """Most steps of that optimizer."""
    window: PositiveInt = 1
    """Iterations whose evolution is fitted, the newest included."""
    forgetting: float = Field(default=0.5, gt=0, le=1)
    """Weight of an iteration against the one after it."""
    judged_on: Literal["next_iteration", "held_out"] = "next_iteration"
    """Evidence by which shrinkage and use are chosen: what the previous fit would have predicted of this iteration, or
    prompts of the same iterations that were left out."""
    held_out: float = Field(default=0.25, gt=0, lt=1)
    """Share of prompts left out."""
    shrinkage: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(0.25, 0.5, 0.75, 1.0), min_length=1)
    """Factors of W_p to choose from, by layer; 0 is always among them."""
    memory: float = Field(default=0.9, ge=0, le=1)
    """Weight of an iteration's evidence against that of the one after it; 0 goes by the newest alone."""
    evidence: NonNegativeFloat = 2.0
    """Standard errors by which a layer's predictor must lower the KL of the zero predictor to be used."""


class EvaluationConfig(Config):
    """How the new policy is scored on held-out problems."""

    benchmarks: dict[str, str] = Field(default_factory=lambda: {"addition": EMBEDDED})
    """Name to Parquet file in verl's schema, or `embedded`."""
    samples: PositiveInt = 4
    """n of avg@n and pass@n."""
    samples_of: dict[str, PositiveInt] = Field(default_factory=dict)
    """Name of a benchmark to an n of its own."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    every: PositiveInt = 1
    """Evaluate after every so many iterations, and after the last."""

    @field_validator("benchmarks")
    @classmethod
    def _names_are_metric_parts(cls, benchmarks: dict[str, str]) -> dict[str, str]:
        for name in benchmarks:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"benchmark name {name!r} becomes part of a metric key: letters, digits, - and _")
        return benchmarks


class StorageConfig(Config):
    """Where artifacts live."""

    root: str | None = None
    """Any fsspec URL (`s3://bucket/runs`, a folder); by default MOE_REPLAY_ROOT, else `runs` under MOE_REPLAY_HOME."""
    chunk_tokens: PositiveInt = 65536
    """Tokens per chunk of the routing archive, the least that a partial read touches in one layer."""
    codec: Literal["expert-set", "zstd"] = "expert-set"
    """What compresses the routing archive: `expert-set` is smaller, `zstd` any zarr library can read."""
    keep_order: bool = False
    """Archive the experts of a token in the engine's order, which takes more space; else by ascending id."""

    @model_validator(mode="after")
    def _root_names_a_place_and_no_credentials(self) -> "StorageConfig":
        # The root is logged, tracked and printed. A validator of the whole section leaves the value out of the error.
        scheme, separator, rest = (self.root or "").partition("://")
        if separator and scheme not in ("file", "memory") and not rest.strip("/"):
            raise ValueError(f"root {scheme}:// names no bucket; give {scheme}://bucket/folder")
        names_a_container = scheme in ("abfs", "abfss", "az") and rest.count("@") == 1 and ":" not in rest.split("@")[0]
        if separator and scheme != "file" and ("?" in rest or ("@" in rest and not names_a_container)):
            raise ValueError(
                "root holds '@' or '?', where URLs carry credentials; give those in the environment "
                "(AWS_ACCESS_KEY_ID, ...) and the root without them"
            )
        return self


class TrackingConfig(Config):
    """How MLflow files the run; where is MLFLOW_TRACKING_URI, by default a database in MOE_REPLAY_HOME."""

    experiment: str = Field(default="moe-replay", min_length=1)
    """MLflow experiment."""
    comparison: str | None = None
    """Name of the comparison that the run is part of: a tag by which MLflow's compare view groups runs."""


class StagesConfig(Config):
    """How stages are retried."""

    retries: NonNegativeInt = 2
    """Attempts after the first, for transient errors only."""
    retry_delay_seconds: NonNegativeFloat = 2.0
    """Wait before the first retry; doubles with each one."""
    timeout_seconds: PositiveFloat = 6 * 3600.0
    """A stage that takes longer is stopped and its engine replaced."""
