"""What a predictor was measured to do, against predicting nothing, and the rule by which that is enough to use it.

Changes are paired, token by token, and their standard errors are over prompt groups: the tokens of a prompt's responses
are much alike, and as many independent tokens would claim a precision that is not there.
"""

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FactorEvidence(_Record):
    """How W_p times one factor did; means over tokens."""

    factor: float
    kl: float
    """KL(softmax(p_θ) ‖ softmax(p_old + factor * h W_p)), in nats."""
    kl_change: float
    """`kl` minus that of the zero predictor."""
    kl_change_error: float | None
    """Standard error of `kl_change` over prompt groups; none where there are fewer than two."""
    agreement: float
    """Share of the K experts of p_θ that are among those predicted."""
    agreement_change: float
    """`agreement` minus that of the zero predictor."""
    agreement_change_error: float | None
    """Standard error of `agreement_change` over prompt groups; none where there are fewer than two."""


class LayerEvidence(_Record):
    """How one layer's predictor did on some tokens, by the factor it was shrunk by."""

    tokens: int
    groups: int
    """Prompt groups that the tokens are of."""
    kl_zero: float
    """KL(softmax(p_θ) ‖ softmax(p_old)), in nats: how far the router moved."""
    agreement_zero: float
    """Share of the K experts of p_θ that p_old chose too."""
    factors: tuple[FactorEvidence, ...]
    """Empty where there was no predictor to measure."""
    weight: float = Field(default=1.0, gt=0)
    """What it counts beside the evidence of one iteration; more where it is pooled."""

    def after(self, earlier: "LayerEvidence", memory: float) -> "LayerEvidence":
        """This iteration's evidence pooled with what was known before, which counts `memory` (0..1) of what it did.

        One iteration's drift says little of the next one's: what persists shows over several. Means are weighted,
        squared errors by squared weights, as if the iterations were independent. Evidence on other factors, which is
        of other settings, and evidence without errors, of a single prompt, is forgotten.
        """
        same = [one.factor for one in earlier.factors] == [one.factor for one in self.factors]
        told = all(one.kl_change_error is not None for one in earlier.factors)
        if not self.factors or not same or not told or memory == 0:
            return self
        before = memory * earlier.weight
        share = before / (before + self.weight)

        def mixed(old: float, new: float) -> float:
            return share * old + (1 - share) * new

        def spread(old: float | None, new: float | None) -> float | None:
            if old is None or new is None:
                return old  # one prompt tells no error; it is not let undo what many told
            return ((share * old) ** 2 + ((1 - share) * new) ** 2) ** 0.5

        return LayerEvidence(
            tokens=earlier.tokens + self.tokens,
            groups=earlier.groups + self.groups,
            kl_zero=mixed(earlier.kl_zero, self.kl_zero),
            agreement_zero=mixed(earlier.agreement_zero, self.agreement_zero),
            factors=tuple(
                FactorEvidence(
                    factor=new.factor,
                    kl=mixed(old.kl, new.kl),
                    kl_change=mixed(old.kl_change, new.kl_change),
                    kl_change_error=spread(old.kl_change_error, new.kl_change_error),
                    agreement=mixed(old.agreement, new.agreement),
                    agreement_change=mixed(old.agreement_change, new.agreement_change),
                    agreement_change_error=spread(old.agreement_change_error, new.agreement_change_error),
                )
                for old, new in zip(earlier.factors, self.factors, strict=True)
            ),
            weight=before + self.weight,
        )

    def why_zero(self, standard_errors: float) -> str:
        """In a few words why no factor is used; empty where one is."""
        if self.choice(standard_errors):
            return ""
        if not self.factors:
            return "no fit before"
        if all(one.kl_change_error is None for one in self.factors):
            return "one prompt alone"
        lowers_kl = any(_lowers_kl(one, standard_errors) for one in self.factors)
        return "agreement not raised" if lowers_kl else "KL not lowered enough"

    def choice(self, standard_errors: float) -> float:
        """The factor to use: of those that beat the zero predictor the one with the least KL, else 0.

        To beat it is to lower its KL by that many standard errors and to raise its agreement.
        """
        passing = [one for one in self.factors if _beats_zero(one, standard_errors)]
        return min(passing, key=lambda one: one.kl).factor if passing else 0.0


def _beats_zero(one: FactorEvidence, standard_errors: float) -> bool:
    return _lowers_kl(one, standard_errors) and one.agreement_change > 0


def _lowers_kl(one: FactorEvidence, standard_errors: float) -> bool:
    return one.kl_change_error is not None and one.kl_change < -standard_errors * one.kl_change_error
