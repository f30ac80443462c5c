"""Variants of methods that the flow is tested with, by run id, as settings that leave the engines as they are."""

# One prompt left out would be no evidence, however little of it is asked.
_USED_AT_ONCE = {"predictor.judged_on": "held_out", "predictor.held_out": 0.5, "predictor.evidence": 0.0}
VARIANTS = {
    "at-once": {"method": "pr2", "evaluation.samples_of": {"addition": 3}, **_USED_AT_ONCE},
    "one-step-off": {"method": "r3", "rollout.one_step_off": True},
    "in-the-old-pass": {"method": "pr2", "method.route_source": "old_log_prob", **_USED_AT_ONCE},
}
