import pickle

import pytest

from moe_replay.alarm import AlarmConfig, Excess, actions_for
from moe_replay.config import RunConfig
from moe_replay.config_reading import parse_config
from moe_replay.errors import ConfigError, StabilityAlarm
from moe_replay.methods import Method
from moe_replay.stages.run import STAGE_SECTIONS

CALM = {"mismatch/kl_k3": 1e-4, "mismatch/extreme_fraction": 0.0}


@pytest.mark.parametrize(
    ("bounds", "metrics", "excess"),
    [
        ({}, {"mismatch/kl_k3": 9.0, "mismatch/extreme_fraction": 1.0}, None),
        ({"kl_k3": 1e-4, "extreme_fraction": 0.0}, CALM, None),
        ({"kl_k3": 9e-5}, CALM, ("mismatch/kl_k3", 1e-4, 9e-5)),
        (
            {"kl_k3": 1.0, "extreme_fraction": 0.01},
            CALM | {"mismatch/extreme_fraction": 0.02},
            ("mismatch/extreme_fraction", 0.02, 0.01),
        ),
    ],
    ids=["no bounds", "at the bounds", "KL", "extreme tokens"],
)
def test_a_metric_beyond_its_bound_is_told_with_both_numbers(bounds, metrics, excess):
    assert AlarmConfig(**bounds).excess(metrics) == (excess and Excess(*excess))


def test_no_alarm_is_the_default_and_a_bound_can_be_taken_away():
    assert RunConfig().alarm.excess({"mismatch/kl_k3": 9.0, "mismatch/extreme_fraction": 1.0}) is None
    assert parse_config({"alarm": {"kl_k3": "none", "extreme_fraction": "none"}}) == RunConfig()


@pytest.mark.parametrize("alarm", [{"kl_k3": -1.0}, {"extreme_fraction": 1.5}, {"lr_factor": 1.0}, {"rule": "stop"}])
def test_impossible_settings_are_refused(alarm):
    with pytest.raises(ConfigError, match=f"alarm.{next(iter(alarm))}"):
        parse_config({"alarm": alarm})


@pytest.mark.parametrize(("name", "falls"), [("grpo", True), ("r2", True), ("r3", False), ("pr2", False)])
def test_only_a_method_that_does_not_replay_the_rollout_can_fall_back_to_it(name, falls):
    assert ("fall_back" in actions_for(Method.model_validate(name))) is falls
    assert "fall_back" not in actions_for(Method.model_validate(name), fallen_back=True)
    document = {"method": name, "alarm": {"rule": "fall_back"}}
    if falls:
        assert parse_config(document).alarm.rule == "fall_back"
    else:
        with pytest.raises(ConfigError, match=f"which {name} replays already; take skip, lower_lr or pause"):
            parse_config(document)


def test_how_a_run_is_watched_is_no_part_of_what_its_stages_depend_on():
    watched = parse_config({"alarm": {"kl_k3": 1e-3, "rule": "skip"}})
    assert all(watched.digest(*sections) == RunConfig().digest(*sections) for sections in STAGE_SECTIONS.values())


def test_an_alarm_comes_whole_out_of_an_engines_process():
    error = pickle.loads(pickle.dumps(StabilityAlarm("decide", "mismatch/kl_k3", 0.2, 0.1)))
    assert (str(error), error.metric, error.value, error.bound) == ("decide", "mismatch/kl_k3", 0.2, 0.1)
