"""What an iteration's training saw of its routes, by layer and by mini-step: the object `routing.json` of a training.

Legend of shapes: L MoE layers, E experts, D bins of deviation (0, 1, 2, 3 or more experts that differ), B counts of
layers (0 to L).
"""

from pydantic import BaseModel, ConfigDict, model_validator

ROUTING_FILE = "routing.json"
"""Where it lies in a training artifact."""
EXTREME_RATIO = 2.0
"""τ of R3's F(τ): a token is extreme when π/μ or μ/π passes it (arXiv 2510.11370)."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MiniStepRouting(_Record):
    """The live routers' choice at one mini-step, before its weights change, against the reference routes."""

    agreement_L: tuple[float, ...]
    """Mean of |I_reference ∩ I_live| / K."""
    coverage_gap_L: tuple[float, ...]
    """Mean of 1 minus the live gate distribution's mass on the reference's experts; empty where routers don't tell."""
    deviation_LD: tuple[tuple[float, ...], ...]
    """Share of tokens by the number of experts that differ."""


class RoutingStatistics(_Record):
    """Routes of one iteration: rollout against trainer in the old log-prob pass, then the mini-steps."""

    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer."""
    router_fraction_L: tuple[float, ...]
    """Share of tokens whose expert set differs between rollout and trainer."""
    differing_layers_B: tuple[int, ...]
    """Number of tokens by how many layers differ, 0 to L."""
    load_LE: tuple[tuple[int, ...], ...]
    """Tokens that each expert served in the rollout."""
    mini_steps: tuple[MiniStepRouting, ...]

    @model_validator(mode="after")
    def _is_of_one_model(self) -> "RoutingStatistics":
        num_layers = len(self.layers)
        by_layer = [self.router_fraction_L, self.load_LE, self.differing_layers_B[1:]]
        by_layer += [part for step in self.mini_steps for part in (step.agreement_L, step.deviation_LD)]
        by_layer += [step.coverage_gap_L for step in self.mini_steps if step.coverage_gap_L]
        found = sorted({len(part) for part in by_layer})
        if found != [num_layers]:
            raise ValueError(f"all parts must cover {num_layers} layers, found {found}")
        return self
