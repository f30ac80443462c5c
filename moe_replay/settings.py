"""What all sections of a config have in common."""

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

NONE = "none"
"""What a key that may be left out is set to where it is to be so: TOML has no null."""


class Config(BaseModel):
    """Frozen, and refuses keys it doesn't know; the docstrings of its keys are what Prefect's forms show."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kinds = {name: get_args(field.annotation) for name, field in cls.model_fields.items()}
        unset = {name for name, of in kinds.items() if given.get(name) == NONE and NoneType in of and str not in of}
        return {name: None if name in unset else value for name, value in given.items()}
