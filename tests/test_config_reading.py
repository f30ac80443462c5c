"""Configs as they are written: files, overrides, and what is told of a wrong one."""

import re
from types import UnionType
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.config import Config, RunConfig
from moe_replay.config_reading import load_config, parse_config, parse_override
from moe_replay.errors import ConfigError
from moe_replay.methods import PRESETS, Method

SECTIONS = sorted(RunConfig.model_fields)

plain_values = st.one_of(
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)


def as_toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def models_in(annotation) -> list[type]:
    """Config models that a field holds."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [part for part in parts if isinstance(part, type) and issubclass(part, (Config, Method))]


def test_every_key_is_documented():
    undocumented, pending = [], [("", RunConfig)]
    while pending:
        prefix, model = pending.pop()
        for name, field in model.model_fields.items():
            inner = models_in(field.annotation)
            pending += [(f"{prefix}{name}.", part) for part in inner]
            if not field.description and not all(part.__doc__ for part in inner or [object()]):
                undocumented.append(prefix + name)
    assert undocumented == []


@given(plain_values)
def test_an_override_keeps_a_toml_values_type(value):
    key, read = parse_override(f"a.b={as_toml(value)}")
    assert (key, read, type(read)) == ("a.b", value, type(value))


@pytest.mark.parametrize("text", ["s3://bucket/a=b", "allenai/OLMoE-1B-7B-0924", "~/data/a.parquet", "r3", "1.2.3", ""])
def test_an_override_that_is_no_toml_is_text(text):
    assert parse_override(f"model.path={text}") == ("model.path", text)


@pytest.mark.parametrize("text", ["rollout.prompts", "=3", ""])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match="key=value"):
        parse_override(text)


def test_overrides_lie_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("iterations = 7\n[rollout]\nprompts = 16\nresponses = 4\n")
    config = load_config(path, {"rollout.prompts": 8, "seed": 3})
    assert (config.iterations, config.seed) == (7, 3)
    assert (config.rollout.prompts, config.rollout.responses) == (8, 4)


def test_a_key_of_a_preset_is_overridden_though_the_file_has_its_name_alone(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('method = "grpo"\n')
    method = load_config(path, {"method.clip_high": 0.3}).method
    assert method == Method.model_validate(PRESETS["grpo"] | {"name": "grpo", "clip_high": 0.3})


def test_a_key_of_the_default_method_is_overridden_without_naming_the_method():
    assert load_config(None, {"method.importance_threshold": 2.0}).method.label == "r3+importance_threshold=2.0"


def test_a_key_below_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--set seed\.of\.what: 'of' holds the value 3"):
        load_config(None, {"seed.of": 3, "seed.of.what": 4})


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"rollout": {"prompt": 3}}, "unknown config key 'rollout.prompt': did you mean 'prompts'?"),
        ({"iteration": 3}, "unknown config key 'iteration': did you mean 'iterations'?"),
        ({"training": {"mini_step": 3}}, "unknown config key 'training.mini_step': did you mean 'mini_steps'?"),
        ({"method": {"name": "r3", "clip": 1}}, "unknown config key 'method.clip'"),
        ({"storage": {"bucket": "b"}}, "unknown config key 'storage.bucket': known here: root, chunk_tokens"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(document, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_config(document)


@given(st.sampled_from(SECTIONS), st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_key_outside_the_schema_is_accepted(section, key):
    with pytest.raises(ConfigError):
        parse_config({section: {f"{key}_x": 1}})


def keys_below(model, prefix=()) -> list[tuple[str, ...]]:
    found = []
    for name, field in model.model_fields.items():
        found.append((*prefix, name))
        for inner in models_in(field.annotation):
            found += keys_below(inner, (*prefix, name))
    return found


def complaint_about(key: tuple[str, ...], value) -> str:
    document = value
    for part in reversed(key):
        document = {part: document}
    try:
        parse_config(document)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [3, 2.5, "text", True, [], [1, 2, 3], ["x"], {"a": 1}], ids=repr)
def test_a_value_of_a_wrong_kind_is_told_in_the_words_of_toml(value):
    told = [complaint_about(key, value) for key in keys_below(RunConfig)]
    assert len([one for one in told if one]) > len(SECTIONS)
    assert [one for one in told if re.search(r"[Tt]uple|[Dd]ictionary|instance of|given: True|None", one)] == []


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"rollout": 3}, "rollout: Input should be a valid table (given: 3)"),
        ({"training": {"adam_betas": 0.9}}, "training.adam_betas: Input should be a valid list (given: 0.9)"),
        ({"training": {"adam_betas": [0.9, 0.9, 0.9]}}, "List should have at most 2 item(s), not 3"),
        ({"predictor": {"shrinkage": []}}, "predictor.shrinkage: List should have at least 1 item(s), not 0"),
        ({"model": {"path": True}}, "model.path: Input should be a valid string (given: true)"),
        ({"alarm": {"kl_k3": {"a": 1}}}, "alarm.kl_k3: Input should be a valid number (given: {a = 1})"),
        ({"training": {"adam_betas": {"a": [True]}}}, "Input should be a valid list (given: {a = [true]})"),
        ({"method": {"name": ["r3"]}}, "no preset is named ['r3']"),
        ({"method": {"clip_low": 0.1}}, "method: the table has no name (known are grpo"),
    ],
    ids=str,
)
def test_lists_and_tables_are_called_so(document, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_config(document)


def test_every_wrong_key_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config({"iterations": 0, "seed": -1, "model": {"pth": "x"}})
    assert len(str(caught.value).splitlines()) == 3
