"""TRL's `GRPOTrainer` on a run's model, prompts, batch, sampling, loss and optimizer, in a process of its own.

Started by `alternatives.py`, of which it reads one line of JSON for each run and answers it with one. The same as in
moe-replay: float32 weights, the chat template, the prompts of each iteration in their order, responses per prompt and
their greatest length, temperature, rewards, advantages within a group, one rollout batch for κ optimizer steps on equal
parts of it, an old log-prob pass, PPO's clip, the mean over a part's tokens, AdamW and the clip of gradients, no KL
term, no balancing loss, transformers' grouped kernel for experts. What differs:

- responses come from `generate` of transformers, in float32, with random numbers of its own. It is the fastest of TRL's
  ways here: with 1.16, continuous batching warms up for seconds at each batch, and the colocated vLLM 0.28 can't take
  weights on a CPU (`'Parameter' object has no attribute 'weight_loader'`);
- the batch is shuffled before it is cut into κ parts; a group's standard deviation gets 1e-4 instead of 1e-6;
- entropy and clip shares are computed in each step, as TRL always does; of routers nothing is computed or replayed;
- model and optimizer live in the process that samples, so no weights are handed over.

With `saves` a checkpoint with optimizer state is written after each iteration, so that a run could be resumed there.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import clocks

from moe_replay.config import RunConfig
from moe_replay.data.rewards import score
from moe_replay.errors import ConfigError
from moe_replay.stages.run import Run

GENERATE, OLD_LOG_PROBS, STEPS = "sampling", "old log-probs", "optimizer steps"


class Trl:
    """TRL in a process of its own, which is kept; `version` is None where it isn't installed."""

    def __init__(self, python: str, log: Path) -> None:
        self._python, self._log = python, log

    def __enter__(self) -> "Trl":
        """Start it, and wait until it has said which TRL it has."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        root = Path(__file__).parent.parent
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [self._python, Path(__file__).with_name("trl_grpo.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.version: str | None = self._hear()["trl"]
        return self

    def __exit__(self, *error: object) -> None:
        """It ends when its input does."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def train(self, run: Run, saves: bool) -> dict[str, list]:
        """What `train` tells of one run; a checkpoint, where it saves, goes to the disk that moe-replay writes to."""
        assert self._process.stdin
        asked = {"run": run.model_dump(mode="json"), "saves": saves, "folder": run.root.removeprefix("file://")}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TRL's process ended; its log is {self._log}")
        return json.loads(line)


def main() -> None:
    """Answer each line of standard input: a run, how it saves, and where."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries' own words
    print(json.dumps({"trl": _version()}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory(dir=asked["folder"]) as folder:
            run = Run.model_validate(asked["run"])
            print(json.dumps(train(run, Path(folder), asked["saves"])), file=answers, flush=True)


def _version() -> str | None:
    if importlib.util.find_spec("trl") is None:
        return None
    from importlib.metadata import version

    return version("trl")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The arguments of TRL's `GRPOConfig` under which it computes what a run of `config` does.

    Raises ConfigError for a method that replays routes, or has another loss than `grpo`.
    """
    require_grpo(config)
    method, rollout, training = config.method, config.rollout, config.training
    return {
        "use_cpu": True,
        "bf16": training.dtype == "bfloat16",
        "seed": config.seed,
        # One rollout batch makes κ parts, each of them one optimizer step.
        "per_device_train_batch_size": rollout.prompts * rollout.responses // training.mini_steps,
        "steps_per_generation": training.mini_steps,
        "gradient_accumulation_steps": 1,
        "num_iterations": 1,
        "max_steps": config.iterations * training.mini_steps,
        "num_generations": rollout.responses,
        "max_completion_length": rollout.max_response_tokens,
        "temperature": rollout.temperature,
        "shuffle_dataset": False,
        "loss_type": "bnpo",
        "epsilon": method.clip_low,
        "epsilon_high": method.clip_high,
        "beta": 0.0,
        "scale_rewards": "group",
        "router_aux_loss_coef": 0.0,
        "optim": "adamw_torch_fused",
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant" if training.warmup_steps == 0 else "constant_with_warmup",
        "warmup_steps": training.warmup_steps,
        "adam_beta1": training.adam_betas[0],
        "adam_beta2": training.adam_betas[1],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.recompute,
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def require_grpo(config: RunConfig) -> None:
    """Raise ConfigError for what other trainers are not set to compute here."""
    method = config.method
    if (method.route_source, method.policy_loss, method.loss_aggregation) != ("none", "vanilla", "token-mean"):
        raise ConfigError(f"method {method.label} is not what others are set to compute here; give method=grpo")


def saving_of(config: RunConfig, saves: bool) -> dict[str, Any]:
    """The arguments that say what is written: a checkpoint after each iteration, or nothing."""
    if not saves:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": config.training.mini_steps, "save_total_limit": 1}


def train(run: Run, folder: Path, saves: bool) -> dict[str, list]:
    """Train from the run's model; when each iteration ended, its response tokens and mean reward, and the clocks."""
    from trl import GRPOConfig

    seen: dict[str, list] = {"ended": [], "response_tokens": [], "rewards": []}
    settings = settings_of(run.config) | saving_of(run.config, saves)
    trainer = _trainer(run, GRPOConfig(output_dir=str(folder), **settings), seen)
    clocks.take(None, None)
    trainer.train()
    return seen | {"spans": clocks.take(None, None)}


def _trainer(run: Run, settings: Any, seen: dict[str, list]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    kappa = run.config.training.mini_steps

    def reward(prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
        told = zip(columns["data_source"], completions, columns["ground_truth"], columns["extra_info"], strict=True)
        rewards = [score(source, one[0]["content"], truth, json.loads(extra)) for source, one, truth, extra in told]
        seen["response_tokens"].append(sum(map(len, completion_ids)))
        seen["rewards"].append(sum(rewards) / len(rewards))
        return rewards

    class Ends(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.began = time.perf_counter()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            clocks.note(STEPS, time.perf_counter() - self.began)

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step % kappa == 0 and not control.should_save:
                seen["ended"].append(time.time())

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seen["ended"].append(time.time())

    class Timed(GRPOTrainer):
        _generate_single_turn = clocks.timed(GRPOTrainer._generate_single_turn, GENERATE)
        _generate_and_score_completions = clocks.timed(GRPOTrainer._generate_and_score_completions, OLD_LOG_PROBS)
        training_step = clocks.timed(GRPOTrainer.training_step, STEPS)
        _save_checkpoint = clocks.timed(GRPOTrainer._save_checkpoint, "checkpoint")

    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    return Timed(
        model, reward, args=settings, train_dataset=_prompts(run), processing_class=tokenizer, callbacks=[Ends()]
    )


def _prompts(run: Run) -> Any:
    """The prompts of all iterations, in the order in which the run draws them."""
    from datasets import Dataset

    table, config = run.train.open(), run.config
    drawn = [one for n in range(config.iterations) for one in table.draw(n, config.rollout.prompts, run.seed("data"))]
    return Dataset.from_list(
        [
            {
                "prompt": one.messages,
                "data_source": one.data_source,
                "ground_truth": one.ground_truth,
                "extra_info": json.dumps(one.extra_info),
            }
            for one in drawn
        ]
    )


if __name__ == "__main__":
    main()
