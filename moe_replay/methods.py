"""The methods of routing replay, as data (`docs/methods.md` has the mathematics).

A method says where the experts of the training pass come from, whether they are predicted, which of verl's policy
losses is used, and whether the train-infer mismatch is corrected by a truncated importance weight. The names are
presets; any field of a preset can be overridden, and a name of your own with all fields given is a method too.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, PositiveFloat, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

RouteSource = Literal["none", "old_log_prob", "rollout"]
PolicyLoss = Literal["vanilla", "gspo"]
"""verl's losses whose normalisation over micro-batches and clip metrics are tested here."""
LossAggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]

_GRPO = {
    "route_source": "none",
    "predictor": False,
    "policy_loss": "vanilla",
    "loss_aggregation": "token-mean",
    "clip_low": 0.2,
    "clip_high": 0.28,  # clip-higher of DAPO, arXiv 2503.14476
    "importance_threshold": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    # GRPO, arXiv 2402.03300.
    "grpo": _GRPO,
    # GSPO, arXiv 2507.18071: ratio and clip of whole sequences.
    "gspo": _GRPO
    | {"policy_loss": "gspo", "loss_aggregation": "seq-mean-token-mean", "clip_low": 3e-4, "clip_high": 4e-4},
    # Truncated importance sampling, Yao et al. 2025: min(π_old/μ_old, C).
    "tis": _GRPO | {"importance_threshold": 2.0},
    # R2, arXiv 2507.18071 and 2512.01374: replay the trainer's old-log-prob pass.
    "r2": _GRPO | {"route_source": "old_log_prob"},
    # R3, arXiv 2510.11370: replay the inference engine's routes.
    "r3": _GRPO | {"route_source": "rollout"},
    # PR2, arXiv 2606.00395: the rollout routes to the experts that are predicted to be active after the update.
    "pr2": _GRPO | {"route_source": "rollout", "predictor": True},
}


DEFAULT_PRESET = "r3"
"""The method of a run that names none."""


class Method(BaseModel):
    """How one training run treats routes, loss and train-infer mismatch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    name: str
    """A preset (`grpo`, `gspo`, `tis`, `r2`, `r3`, `pr2`) or a name of your own, which then needs every field."""
    route_source: RouteSource
    """Experts of the training pass: `none` (the router's own), `old_log_prob` (R2) or `rollout` (R3)."""
    predictor: bool
    """Whether the pass that `route_source` names routes under predicted gates (PR2); needs such a pass."""
    policy_loss: PolicyLoss
    """A policy loss of verl's registry (`verl.trainer.ppo.core_algos`)."""
    loss_aggregation: LossAggregation
    """verl's `loss_agg_mode`."""
    clip_low: PositiveFloat
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat
    """The ratio is clipped above at 1 + clip_high."""
    importance_threshold: float | None = Field(default=None, gt=1.0)
    """C of truncated importance sampling, per token; none switches the correction off."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given not in PRESETS:
                raise ValueError(
                    f"unknown method {given!r}: known are {', '.join(PRESETS)}; "
                    "for one of your own give a table with a name and every field"
                )
            given = {"name": given}
        if isinstance(given, dict):
            if given.get("importance_threshold") == "none":  # TOML has no null
                given = {**given, "importance_threshold": None}
            missing = [] if str(given.get("name")) in PRESETS else [key for key in _GRPO if key not in given]
            if [key for key in missing if key != "importance_threshold"]:
                found = f"no preset is named {given['name']!r}" if "name" in given else "the table has no name"
                raise ValueError(
                    f"{found} (known are {', '.join(PRESETS)}), and a method of your "
                    f"own needs every field: {', '.join(missing)} missing"
                )
            return {**PRESETS.get(str(given.get("name")), {}), **given}
        return given

    @model_validator(mode="after")
    def _predicts_what_is_replayed(self) -> "Method":
        if self.predictor and self.route_source == "none":
            raise ValueError(
                "predictor = true predicts the routes that training replays, and route_source = 'none' replays none; "
                "set route_source to 'rollout' (PR2) or 'old_log_prob' (its authors' variant)"
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A preset's name is enough, alone or in a table; Prefect checks a deployment's parameters by this schema."""
        table = {**handler(schema), "required": ["name"]}
        return {"anyOf": [{"type": "string", "enum": list(PRESETS), "title": "Preset"}, table]}

    @property
    def label(self) -> str:
        """The name, followed by what differs from the preset of that name: `r3+policy_loss=gspo`."""
        preset = PRESETS.get(self.name, {})
        changed = [f"{key}={getattr(self, key)}" for key, value in preset.items() if getattr(self, key) != value]
        return "+".join([self.name, *changed])
