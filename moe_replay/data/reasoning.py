"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym): 100 and more, made offline, with scorers.

A scorer needs the entry a question came with. It travels in the Parquet file as JSON, in `extra_info.entry`.
"""

import difflib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from moe_replay.data.prompts import Prompt, write_prompts
from moe_replay.errors import ConfigError

SOURCE_PREFIX = "reasoning_gym/"

Scorer = Callable[[str | None, dict[str, Any]], float]


def write_parquet(task: str, path: Path, size: int, seed: int) -> None:
    """Write `size` problems of a reasoning-gym task, with its default settings, in verl's schema.

    Raises ConfigError for an unknown task, one that can't be made from defaults, or a size below 1.
    """
    require_task(task)
    if size < 1:
        raise ConfigError(f"a file of {size} problems was asked for; --size must be at least 1")
    import reasoning_gym
    from reasoning_gym.utils import SYSTEM_PROMPTS

    try:
        entries = list(reasoning_gym.create_dataset(task, size=size, seed=seed))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"reasoning-gym can't make {task!r} with its default settings ({error}); choose another task, "
            "or write the Parquet file with a script of your own"
        ) from error
    prompts = [
        Prompt(
            row=row,
            messages=[
                {"role": "system", "content": SYSTEM_PROMPTS["default"]},
                {"role": "user", "content": entry["question"]},
            ],
            data_source=SOURCE_PREFIX + task,
            ground_truth=entry["answer"],
            extra_info={"index": row, "entry": encode_entry(entry)},
        )
        for row, entry in enumerate(entries)
    ]
    write_prompts(path, prompts)


def require_task(task: str) -> None:
    """Raise ConfigError, naming the closest tasks, unless reasoning-gym has this one."""
    from reasoning_gym.factory import DATASETS

    if task in DATASETS:
        return
    close = difflib.get_close_matches(task, DATASETS, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(sorted(DATASETS))}"
    raise ConfigError(f"reasoning-gym has no task {task!r} among its {len(DATASETS)}; {hint}")


def score(task: str, response: str, extra_info: dict[str, Any]) -> float:
    """The task's own score, 0 to 1, of the last `<answer>` in the response, or of all of it where there is none.

    Raises ConfigError when the row does not carry the entry of the problem.
    """
    from reasoning_gym.utils import extract_answer

    if not isinstance(extra_info.get("entry"), str):
        raise ConfigError(
            f"a row of {SOURCE_PREFIX}{task} has no extra_info.entry, which its scorer needs "
            f"(extra_info holds {', '.join(extra_info) or 'nothing'}); write the file with "
            f"`moe-replay data reasoning-gym {task} OUT`"
        )
    entry = decode_entry(extra_info["entry"])
    answer = extract_answer(response)
    try:
        return float(_scorer(task)(response.strip() if answer is None else answer, entry))
    except ImportError:
        raise
    except Exception:
        # Some scorers parse an answer without guarding against what a model may write: not parsable is not right.
        return 0.0


@cache
def _scorer(task: str) -> Scorer:
    from reasoning_gym import get_score_answer_fn

    # The annotation upstream, Callable[[], float], leaves out the parameters.
    scorer: Any = get_score_answer_fn(task)
    return scorer


def encode_entry(entry: dict[str, Any]) -> str:
    """An entry as JSON that keeps tuples and keys other than text, which scorers compare by; see `decode_entry`."""
    return json.dumps(_tag(entry))


def decode_entry(text: str) -> dict[str, Any]:
    """The entry `encode_entry` was given, equal to it in types too."""
    return _untag(json.loads(text))


def _tag(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"__tuple__": [_tag(item) for item in value]}
    if isinstance(value, list):
        return [_tag(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and key not in ("__tuple__", "__items__") for key in value):
            return {key: _tag(item) for key, item in value.items()}
        return {"__items__": [[_tag(key), _tag(item)] for key, item in value.items()]}
    return value


def _untag(value: Any) -> Any:
    if isinstance(value, list):
        return [_untag(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"__tuple__"}:
            return tuple(_untag(item) for item in value["__tuple__"])
        if value.keys() == {"__items__"}:
            return {_untag(key): _untag(item) for key, item in value["__items__"]}
        return {key: _untag(item) for key, item in value.items()}
    return value
