"""The embedded task: 3-digit addition, the sum written from its last digit to its first.

`123+989=` is answered by `2111`. Reversed, each digit depends on those already written and one carry, which a model
of under a million parameters learns in seconds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_replay.data.prompts import Prompt, write_prompts

DATA_SOURCE = "moe_replay/addition"
NUM_PROBLEMS = 1_000_000
"""Problem p asks for p // 1000 + p % 1000."""


@dataclass(frozen=True, eq=False)
class ProblemSplit:
    """Disjoint problems: to train on with reinforcement, to be judged by, and all others (for the warm-up)."""

    train: np.ndarray
    benchmark: np.ndarray
    rest: np.ndarray


def split_problems(num_train: int, num_benchmark: int, seed: int) -> ProblemSplit:
    """Deal out all problems at random, the same for the same arguments."""
    order = np.random.default_rng(seed).permutation(NUM_PROBLEMS)
    benchmark, train, rest = np.split(order, [num_benchmark, num_benchmark + num_train])
    return ProblemSplit(train=train, benchmark=benchmark, rest=rest)


def without_carries(problems: np.ndarray) -> np.ndarray:
    """Those among `problems` whose digits are all below 5."""
    digits = problems // 10 ** np.arange(6)[:, None] % 10
    return problems[(digits < 5).all(0)]


def question_and_answer(problem: int) -> tuple[str, str]:
    """The prompt `ddd+ddd=` of a problem, and the four digits that answer it."""
    left, right = divmod(problem, 1000)
    return f"{left:03d}+{right:03d}=", f"{left + right:04d}"[::-1]


def write_parquet(path: Path, problems: np.ndarray, split: str) -> None:
    """Write problems in verl's schema; `split` ("train", "test") is noted in `extra_info` as verl's scripts do."""
    prompts = []
    for row, problem in enumerate(problems.tolist()):
        question, answer = question_and_answer(problem)
        prompts.append(
            Prompt(
                row=row,
                messages=[{"role": "user", "content": question}],
                data_source=DATA_SOURCE,
                ground_truth=answer,
                extra_info={"split": split, "index": row},
            )
        )
    write_prompts(path, prompts)


def exact_match(response: str, answer: str) -> float:
    """1.0 when the response is the answer and nothing else, else 0.0."""
    return float(response == answer)
