"""What all sections of a config have in common."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, and refuses keys it doesn't know; the docstrings of its keys are what Prefect's forms show."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
