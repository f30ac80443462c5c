"""The embedded model: a tiny Qwen3-MoE with a character tokenizer, warmed up on the embedded addition task.

Made on the spot, since no hub may be reachable, and the same bytes on the same machine and package versions. It is
right in about 40 % of sampled answers: enough for reinforcement learning to have something to reinforce.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.data import addition
from moe_replay.errors import ConfigError, ReplayError
from moe_replay.sections import EMBEDDED, EMBEDDED_TOP_4

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

Progress = Callable[[int, int, str], None]
"""Told (steps done, most steps it can take, what is going on)."""

FORMAT = 1
"""Raise it when the code below makes something else of the same recipe: what was cached is then made anew."""

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = ["\n", *map(chr, range(ord(" "), ord("~") + 1))]
"""Printable ASCII, so that any prompt in English can be fed to the embedded model."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Qwen3-MoE; vLLM's CPU kernels want hidden and intermediate sizes divisible by 32."""

    layers: int = 4
    hidden: int = 64
    expert_width: int = 64
    experts: int = 16
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    max_positions: int = 2048
    init_std: float = 0.08


@dataclass(frozen=True)
class Recipe:
    """All that decides the embedded model and its data; what is cached is filed under its digest."""

    shape: ModelShape = ModelShape()
    seed: int = 0
    learning_rate: float = 6e-3
    learning_rate_ramp: int = 50
    batch: int = 96
    balance_weight: float = 0.01
    """Weight of the router's load-balancing loss."""
    judge_every: int = 10
    target_accuracy: float = 0.40
    """The warm-up stops at the first judgement that reaches it."""
    max_steps: int = 800
    train_rows: int = 4096
    benchmark_rows: int = 64

    def digest(self) -> str:
        """Names the cache folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


RECIPES = {
    EMBEDDED: Recipe(),
    EMBEDDED_TOP_4: Recipe(shape=ModelShape(experts=32, top_k=4, expert_width=32)),
}
"""The embedded models by the name that configs have for them; their data are the same."""
PROMPT_TOKENS = 8
"""Length of every prompt of the embedded task, `ddd+ddd=`."""


@dataclass(frozen=True)
class EmbeddedAssets:
    """Where the embedded model (a Hugging Face folder), training problems and benchmark (Parquet) lie."""

    model: Path
    train: Path
    benchmark: Path


def prepare(home: Path, progress: Progress, recipe: Recipe = RECIPES[EMBEDDED]) -> EmbeddedAssets:
    """The embedded model and data under `home`, made if they are not there yet (about half a minute).

    They appear whole or not at all; of several processes that ask at once, one makes them and the others wait.
    Raises ConfigError when `home` can't be written, ReplayError when the warm-up does not reach its target.
    """
    folder = home / "embedded" / recipe.digest()
    assets = EmbeddedAssets(folder / "model", folder / "train.parquet", folder / "benchmark.parquet")
    if folder.is_dir():
        return assets
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder.with_suffix(".lock")):
            if not folder.is_dir():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                _make(partial, recipe, progress)
                partial.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"can't write the embedded model under {home} ({error}); "
            "set MOE_REPLAY_HOME to a folder that can be written"
        ) from error
    return assets


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock at `path`; the system lets go of it however its holder ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, recipe: Recipe, progress: Progress) -> None:
    split = addition.split_problems(recipe.train_rows, recipe.benchmark_rows, recipe.seed)
    folder.mkdir()
    addition.write_parquet(folder / "train.parquet", split.train, "train")
    addition.write_parquet(folder / "benchmark.parquet", split.benchmark, "test")
    progress(0, recipe.max_steps, "warming up the embedded model")
    tokenizer = build_tokenizer()
    model = warm_up(recipe, tokenizer, split.rest, progress)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    progress(recipe.max_steps, recipe.max_steps, "the embedded model is ready")


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character of printable ASCII; its chat template joins what the messages say."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([PAD, EOS, UNK, *CHARACTERS])}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(shape: ModelShape, tokenizer: "PreTrainedTokenizerFast") -> "Qwen3MoeForCausalLM":
    """A randomly initialised model, from torch's global generator, in float32."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config_of: Any = Qwen3MoeConfig  # its declared parameters lack head_dim
    config = config_of(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.expert_width,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=False,
        initializer_range=shape.init_std,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # the others are 10 to 50 times slower on a CPU
    model.set_attn_implementation("eager")  # the fastest for a dozen tokens
    return model


def warm_up(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", problems: np.ndarray, progress: Progress
) -> "Qwen3MoeForCausalLM":
    """Supervised training on `problems` until the recipe's accuracy; the same bytes for the same arguments.

    Half of each batch has no carries: without them the model sees sooner which digits belong together, and
    every seed gets there. Raises ReplayError when `max_steps` do not suffice. Torch's settings and generator are
    left as found.
    """
    import torch

    with _reproducible_torch(recipe.seed):
        model = build_model(recipe.shape, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        held_out_BT, answer_start = _encode(tokenizer, problems[:256])
        others = problems[256:]
        easy = addition.without_carries(others)
        rng = np.random.default_rng(recipe.seed)
        accuracy = 0.0
        for step in range(1, recipe.max_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1.0, step / recipe.learning_rate_ramp)
            num_easy = recipe.batch // 2
            drawn = np.concatenate([rng.choice(easy, num_easy), rng.choice(others, recipe.batch - num_easy)])
            batch_BT, _ = _encode(tokenizer, drawn)
            _train_step(model, optimizer, batch_BT, answer_start, recipe.balance_weight)
            if step % recipe.judge_every == 0:
                accuracy = _sampled_accuracy(model, held_out_BT, answer_start)
                progress(step, recipe.max_steps, f"warming up the embedded model: {accuracy:.0%} of answers right")
                if accuracy >= recipe.target_accuracy:
                    return model
    raise ReplayError(
        f"the embedded model is right in {accuracy:.1%} of sampled answers after {recipe.max_steps} steps, short of "
        f"{recipe.target_accuracy:.0%}: this machine's arithmetic takes the warm-up elsewhere; report it, "
        "or train a model of your own by giving its path"
    )


def _train_step(model: Any, optimizer: Any, batch_BT: "Tensor", answer_start: int, balance_weight: float) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    outputs = model(batch_BT[:, :-1], use_cache=False, output_router_logits=True)
    logits_BAV = outputs.logits[:, answer_start - 1 :]
    loss = cross_entropy(logits_BAV.flatten(0, 1), batch_BT[:, answer_start:].flatten())
    optimizer.zero_grad()
    (loss + balance_weight * outputs.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _sampled_accuracy(model: Any, ids_BT: "Tensor", answer_start: int) -> float:
    """The expected share of right answers when sampling at temperature 1: the mean probability of the answer."""
    import torch

    with torch.no_grad():
        logits_BAV = model(ids_BT[:, :-1], use_cache=False).logits[:, answer_start - 1 :]
    log_probs_BA = logits_BAV.log_softmax(-1).gather(-1, ids_BT[:, answer_start:, None]).squeeze(-1)
    return log_probs_BA.sum(-1).exp().mean().item()


def _encode(tokenizer: "PreTrainedTokenizerFast", problems: np.ndarray) -> tuple["Tensor", int]:
    """Questions, answers and end tokens as ids [problems, tokens], and where the answers start."""
    import torch

    pairs = [addition.question_and_answer(problem) for problem in problems.tolist()]
    ids = tokenizer([question + answer + EOS for question, answer in pairs])["input_ids"]
    return torch.tensor(ids), len(pairs[0][0])


@contextlib.contextmanager
def _reproducible_torch(seed: int) -> Iterator[None]:
    """One thread, deterministic algorithms and a seeded generator; all put back afterwards.

    A second thread gains less than a fifth on models of this size and loses several-fold on a busy machine.
    """
    import torch

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
