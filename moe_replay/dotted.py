"""Settings as flat names: `training.mini_steps`."""

from collections.abc import Mapping
from typing import Any


def dotted(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings under their keys joined by dots, in order, `prefix` before each."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
