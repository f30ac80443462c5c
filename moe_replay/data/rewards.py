"""Rewards by rule: which scorer a `data_source` names, and what it makes of a response.

Three kinds: the embedded addition task, reasoning-gym's tasks, and everything verl's `default_compute_score` knows.
verl is imported for its own sources alone; that import takes seconds.
"""

import ast
import contextlib
import inspect
import io
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from moe_replay.data import addition, reasoning
from moe_replay.errors import ConfigError


def score(data_source: str, response: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """The reward of a response (text without special tokens), on the scale of the source's own scorer.

    Raises ConfigError for a source `require_known_sources` would refuse.
    """
    if data_source == addition.DATA_SOURCE:
        return addition.exact_match(response, ground_truth)
    if data_source.startswith(reasoning.SOURCE_PREFIX):
        return reasoning.score(data_source.removeprefix(reasoning.SOURCE_PREFIX), response, extra_info)
    from verl.utils.reward_score import default_compute_score

    try:
        result = default_compute_score(data_source, response, ground_truth, extra_info)
    except NotImplementedError as error:
        raise _unknown_sources([data_source], default_compute_score) from error
    return float(result["score"] if isinstance(result, dict) else result)


def require_known_sources(data_sources: Iterable[str]) -> None:
    """Raise ConfigError unless each source has a scorer that can run here; call it before anything starts."""
    foreign = []
    for source in sorted(set(data_sources)):
        if source.startswith(reasoning.SOURCE_PREFIX):
            reasoning.require_task(source.removeprefix(reasoning.SOURCE_PREFIX))
        elif source != addition.DATA_SOURCE:
            foreign.append(source)
    if not foreign:
        return
    from verl.utils.reward_score import default_compute_score

    unknown = [source for source in foreign if not _verl_can_score(source, default_compute_score)]
    if unknown:
        raise _unknown_sources(unknown, default_compute_score)


def _verl_can_score(source: str, compute_score: Callable[..., Any]) -> bool:
    """Ask verl itself, with an empty response: it raises NotImplementedError for a source without a scorer."""
    try:
        # Scorers print when they can't parse; nobody has asked them to score this.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            compute_score(source, "", "")
    except NotImplementedError:
        return False
    except ImportError as error:
        raise ConfigError(
            f"verl's scorer of data source {source!r} needs a package that is not installed ({error}); install it"
        ) from error
    except Exception:  # noqa: S110
        # A scorer was found and choked on the empty ground truth, which is all that was asked.
        pass
    return True


def _unknown_sources(unknown: list[str], compute_score: Callable[..., Any]) -> ConfigError:
    known = [addition.DATA_SOURCE, f"{reasoning.SOURCE_PREFIX}<task>", *_verl_sources(compute_score)]
    return ConfigError(
        f"no scorer for data_source {', '.join(map(repr, unknown))}; known are {', '.join(known)}. "
        "Rename data_source to the one whose scoring rule fits, or write the data with `moe-replay data`"
    )


def _verl_sources(compute_score: Callable[..., Any]) -> list[str]:
    """The sources the installed verl compares `data_source` with; it has no list of them but its code."""
    sources = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(compute_score)))):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "data_source":
            for value in node.comparators:
                literal = ast.literal_eval(value)
                sources += [literal] if isinstance(literal, str) else literal
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "data_source.startswith":
            sources.append(f"{ast.literal_eval(node.args[0])}*")
    return sources
