"""Configs from TOML and from `key=value` overrides, and what is wrong with them in the user's words."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from moe_replay.config import RunConfig
from moe_replay.errors import ConfigError
from moe_replay.methods import DEFAULT_PRESET
from moe_replay.settings import Config

AConfig = TypeVar("AConfig", bound=Config)

_NEAR = 0.8
"""How alike an unknown key and a known one must be to be taken for it: `training` is no slip for `tracking`."""
_LIST, _TABLE = "Input should be a valid list", "Input should be a valid table"
_IN_TOML = {
    "tuple_type": _LIST,
    "dict_type": _TABLE,
    "model_type": _TABLE,
    "too_short": "List should have at least {min_length} item(s), not {actual_length}",
    "too_long": "List should have at most {max_length} item(s), not {actual_length}",
}
"""By pydantic's type of error, what it says of Python's types in the words of TOML."""


def load_config(path: Path | None = None, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a TOML config and lay dotted overrides (`rollout.prompts`) over it.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, a value is impossible.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(
                f"the config {path} can't be read ({error.strerror}); give the path of a TOML file"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the config {path} is not valid TOML: {error}") from error
    return parse_config(document_with(overrides or {}, document))


def document_with(overrides: Mapping[str, Any], document: dict[str, Any] | None = None) -> dict[str, Any]:
    """`document` with dotted overrides (`rollout.prompts`) laid over it."""
    laid_over = document if document is not None else {}
    for key, value in overrides.items():
        _override(laid_over, key, value)
    return laid_over


def parse_config(document: dict[str, Any]) -> RunConfig:
    """Validate a config document. Raises ConfigError listing every key that is wrong and why."""
    return parse_as(RunConfig, document)


def parse_as(schema: type[AConfig], document: dict[str, Any]) -> AConfig:
    """Validate a document as `schema`. Raises ConfigError listing every key that is wrong and why."""
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, schema) for problem in error.errors())) from None


def overridden(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """The config with dotted overrides laid over it; raises ConfigError as `load_config`."""
    return parse_config(document_with(overrides, config.model_dump(mode="json")))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is read as TOML where it is TOML, else it is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r} is not key=value, for example --set rollout.prompts=64")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _override(document: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    table: dict[str, Any] = document
    for parent in parents:
        inner: Any = table.setdefault(parent, DEFAULT_PRESET if parent == "method" else {})
        if parent == "method" and isinstance(inner, str):
            inner = table[parent] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {dotted}: {parent!r} holds the value {inner!r}, it has no key {last!r}")
        table = inner
    table[last] = value


def _explain(problem: Any, schema: type[Config]) -> str:
    """One line for one of pydantic's findings, with the nearest key where a key is unknown."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        told = _IN_TOML.get(problem["type"])
        message = told.format(**problem.get("ctx", {})) if told else problem["msg"].removeprefix("Value error, ")
        # What our own rules find is of a whole section, and told by them.
        given = "" if problem["type"] == "value_error" else f" (given: {_in_toml(problem['input'])})"
        return f"{where}: {message}{given}" if where else message
    model: Any = schema
    for part in problem["loc"][:-1]:
        annotation = model.model_fields[part].annotation
        # A section that may be left out is a union with None.
        model = next((one for one in get_args(annotation) if hasattr(one, "model_fields")), annotation)
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=_NEAR)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown config key {where!r}: {hint}"


def _in_toml(value: Any) -> str:
    """A value as a TOML file says it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_in_toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_in_toml(one) for one in value)}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
