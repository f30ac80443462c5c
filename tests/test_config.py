"""What a config may say, what has to hold between its settings, and what stages depend on."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, parse_config, parse_override
from moe_replay.errors import ConfigError
from moe_replay.methods import PRESETS
from moe_replay.places import run_root
from moe_replay.stages.run import STAGE_SECTIONS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses(path):
    load_config(path)


def test_the_embedded_config_is_the_default_one():
    assert load_config(next(path for path in CONFIGS if path.stem == "embedded")) == RunConfig()


@given(st.integers(1, 12), st.integers(2, 12), st.integers(1, 20))
def test_mini_steps_must_divide_the_rollout_batch(prompts, responses, mini_steps):
    document = {"rollout": {"prompts": prompts, "responses": responses}, "training": {"mini_steps": mini_steps}}
    if prompts * responses % mini_steps == 0:
        assert parse_config(document).training.mini_steps == mini_steps
    else:
        with pytest.raises(ConfigError, match=f"{mini_steps} does not divide .* = {prompts * responses} sequences"):
            parse_config(document)


@given(st.integers(1, 12), st.integers(2, 12), st.integers(1, 20))
def test_ranks_must_divide_the_mini_batch(prompts, responses, ranks):
    document = {
        "rollout": {"prompts": prompts, "responses": responses},
        "training": {"mini_steps": prompts},
        "resources": {"training_world_size": ranks},
    }
    if responses % ranks == 0:
        assert parse_config(document).resources.training_world_size == ranks
    else:
        with pytest.raises(ConfigError, match=f"= {ranks} does not divide the {responses} sequences of a mini-step"):
            parse_config(document)


def test_a_micro_batch_must_hold_the_longest_sequence():
    with pytest.raises(ConfigError, match="hold no sequence"):
        parse_config({"training": {"micro_batch_tokens": 39}})


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 60))
def test_ranks_that_share_sequences_divide_the_ranks_and_hold_the_longest(ranks, sharing, tokens):
    document = {
        "rollout": {"prompts": 8},
        "training": {"mini_steps": 1, "micro_batch_tokens": tokens, "packing": True},
        "resources": {"training_world_size": ranks, "training_sequence_parallel_size": sharing},
    }
    if ranks % sharing:
        with pytest.raises(ConfigError, match=f"= {sharing} does not divide training_world_size = {ranks}"):
            parse_config(document)
    elif 64 % (ranks // sharing):
        with pytest.raises(ConfigError, match=f"= {ranks // sharing} does not divide the 64 sequences of a mini-step"):
            parse_config(document)
    elif tokens * sharing < 40:
        with pytest.raises(
            ConfigError, match=f"= {tokens} on .* = {sharing} rank.* hold no sequence of .* = 40 tokens"
        ):
            parse_config(document)
    else:
        assert parse_config(document).resources.training_shares == ranks // sharing


def test_padded_sequences_are_not_shared_among_ranks():
    with pytest.raises(ConfigError, match=r"training_sequence_parallel_size = 2 .*; set training\.packing = true"):
        parse_config({"resources": {"training_world_size": 2, "training_sequence_parallel_size": 2}})


def test_rollouts_beside_training_take_devices_of_their_own():
    with pytest.raises(ConfigError, match="take turns on the same GPUs; set one of them to false"):
        parse_config({"rollout": {"one_step_off": True}, "resources": {"colocated": True}})


def test_a_predictor_serves_no_rollout_that_begins_before_it_is_fitted():
    with pytest.raises(ConfigError, match="predictor that pr2 serves rollouts with foretells one training, not two"):
        parse_config({"rollout": {"one_step_off": True}, "method": "pr2"})
    predicted = {"name": "pr2", "route_source": "old_log_prob"}
    assert parse_config({"rollout": {"one_step_off": True}, "method": predicted}).method.predictor


def test_flash_attention_computes_in_bfloat16():
    with pytest.raises(ConfigError, match=r"computes in bfloat16, and training\.dtype = 'float32'"):
        parse_config({"training": {"attention": "flash_attention_2"}})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"training.packing": False}, r"takes packed micro-batches alone; set training\.packing = true"),
        ({"training.lora.rank": 4}, r"training\.lora\.rank = 4 asks for adapters; set it to 0"),
        ({"training.attention": "flash_attention_2", "training.dtype": "bfloat16"}, "has attention of its own"),
        (
            {"resources.training_world_size": 2, "resources.training_sequence_parallel_size": 2},
            r"training_sequence_parallel_size = 2; set it to 1",
        ),
        ({"resources.colocated": True}, r"resources\.colocated = true asks; set that to false"),
        ({"method": "pr2", "method.route_source": "old_log_prob"}, "as the old pass of pr2.*; take pr2"),
        ({"rollout.partial_response_tokens": 4, "rollout.oversampled_prompts": 4}, "which r3 replays; set it to none"),
    ],
    ids=str,
)
def test_what_the_megatron_engine_has_nothing_for_is_refused(settings, told):
    megatron = {"training.engine": "megatron", "training.packing": True}
    with pytest.raises(ConfigError, match=rf"engine = 'megatron' .*{told}.*, or set training\.engine = 'fsdp2'"):
        load_config(None, megatron | settings)
    if "training.packing" not in settings:
        load_config(None, {"training.packing": True, **settings})
    assert load_config(None, megatron).training.engine == "megatron"


@pytest.mark.parametrize("key", ["training_expert_parallel_size", "training_pipeline_parallel_size"])
def test_experts_and_layers_are_shared_out_by_megatron_alone(key):
    ranks = {"resources.training_world_size": 2, f"resources.{key}": 2}
    with pytest.raises(ConfigError, match=rf"resources\.{key} = 2 is for training\.engine = 'megatron'"):
        load_config(None, ranks)
    megatron = {"training.engine": "megatron", "training.packing": True}
    shares = load_config(None, megatron | ranks).resources.training_shares
    assert shares == (2 if "expert" in key else 1)
    with pytest.raises(ConfigError, match=r"does not divide training_world_size = 2; change one of the three"):
        load_config(None, megatron | ranks | {f"resources.{key}": 4})


def test_rows_without_routes_that_nothing_replays_are_the_megatron_engines_too():
    partial = {"rollout.partial_response_tokens": 4, "rollout.oversampled_prompts": 4, "method": "r2"}
    assert load_config(None, {"training.engine": "megatron", "training.packing": True, **partial})


@pytest.mark.parametrize("key", ["rollout.share", "alarm.kl_k3", "rollout.partial_response_tokens"])
def test_a_key_that_may_be_left_out_is_unset_by_a_word(key):
    section, _, name = key.partition(".")
    given = {key: 2, "rollout.oversampled_prompts": 2 if "partial" in key else 0}
    assert getattr(getattr(load_config(None, given), section), name) == 2
    unset = load_config(None, given | {"rollout.oversampled_prompts": 0} | dict([parse_override(f"{key}=none")]))
    assert unset == RunConfig()


def test_a_text_may_be_the_word():
    assert load_config(None, {"tracking.comparison": "none"}).tracking.comparison == "none"


def test_an_n_of_its_own_is_of_a_benchmark():
    with pytest.raises(ConfigError, match=r"samples_of names aime24, which is no benchmark; known are addition"):
        parse_config({"evaluation": {"samples_of": {"aime24": 32}}})


def test_the_large_model_is_trained_alike_on_8_and_on_32_gpus():
    names = ("qwen3-30b-a3b", "qwen3-30b-a3b-32-gpus")
    one, four = (load_config(next(path for path in CONFIGS if path.stem == name)) for name in names)
    on_hardware = {"resources": True, "rollout": {"share"}}
    assert one.model_dump(exclude=on_hardware) == four.model_dump(exclude=on_hardware)
    for_rollout = [run.resources.rollout_replicas * run.resources.rollout_tensor_parallel_size for run in (one, four)]
    assert one.resources.colocated
    assert for_rollout[0] == one.resources.training_world_size == 8
    assert not four.resources.colocated
    assert for_rollout[1] + four.resources.training_world_size == 32


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_setting_is_a_finite_number(value):
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        load_config(None, dict([parse_override(f"training.learning_rate={value}")]))


def test_hardware_is_no_part_of_what_a_runs_stages_depend_on():
    ranked = parse_config({"resources": {"training_world_size": 4}})
    assert all(ranked.digest(*sections) == RunConfig().digest(*sections) for sections in STAGE_SECTIONS.values())


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown method 'r4': known are grpo, gspo, tis, r2, r3, pr2"):
        parse_config({"method": "r4"})


@pytest.mark.parametrize("base", ["r2", "r3"])
@pytest.mark.parametrize("changes", [{"policy_loss": "gspo"}, {"importance_threshold": 2.0}])
def test_replay_combines_with_other_losses_and_corrections(base, changes):
    method = parse_config({"method": {"name": base, **changes}}).method
    assert method.route_source == PRESETS[base]["route_source"]
    assert method.label == base + "".join(f"+{key}={value}" for key, value in changes.items())


def test_a_method_of_ones_own_needs_every_field():
    own = PRESETS["gspo"] | {"name": "mine", "route_source": "rollout"}
    assert parse_config({"method": own}).method.label == "mine"
    with pytest.raises(ConfigError, match="needs every field: clip_low missing"):
        parse_config({"method": {key: value for key, value in own.items() if key != "clip_low"}})


@pytest.mark.parametrize(
    "root",
    [
        "ftp://me:secret-word@host/runs",
        "s3://KEY:abc/secret-word@bucket/runs",
        "s3://secret-word@bucket/runs",
        "s3://bucket/runs?secret=secret-word",
        "abfs://container:secret-word@account/runs",
    ],
)
def test_a_root_with_credentials_is_refused_without_telling_them(root):
    with pytest.raises(ConfigError, match="give those in the environment") as caught:
        parse_config({"storage": {"root": root}})
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize("root", ["s3://bucket/runs", "abfs://container@account.example/runs", "/data/a@b/runs"])
def test_a_root_without_credentials_is_taken(root):
    assert parse_config({"storage": {"root": root}}).storage.root == root


def test_a_method_without_importance_weights_can_be_written_in_toml():
    own = PRESETS["tis"] | {"name": "mine"}
    assert parse_config({"method": own | {"importance_threshold": "none"}}).method.importance_threshold is None
    del own["importance_threshold"]
    assert parse_config({"method": own}).method.importance_threshold is None


def test_the_root_defaults_to_a_folder_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_REPLAY_HOME", str(tmp_path))
    assert run_root(RunConfig()) == (tmp_path / "runs").as_uri()
    assert run_root(load_config(None, {"storage.root": "s3://bucket/runs"})) == "s3://bucket/runs"


def test_the_environment_names_another_default_root(monkeypatch):
    monkeypatch.setenv("MOE_REPLAY_ROOT", "s3://runs/team")
    assert run_root(RunConfig()) == "s3://runs/team"
    assert run_root(load_config(None, {"storage.root": "/data/runs"})) == "/data/runs"
    monkeypatch.setenv("MOE_REPLAY_ROOT", "s3://key:secret@runs")
    with pytest.raises(ConfigError, match="give those in the environment"):
        run_root(RunConfig())


def test_pr2_is_r3_with_a_predictor_and_its_authors_variant_one_setting_away():
    r3, pr2 = (load_config(None, {"method": name}).method.model_dump() for name in ("r3", "pr2"))
    assert {key for key in r3 if r3[key] != pr2[key]} == {"name", "predictor"}
    released = load_config(None, {"method": "pr2", "method.route_source": "old_log_prob"}).method
    assert released.label == "pr2+route_source=old_log_prob"


def test_a_predictor_without_replay_is_refused():
    with pytest.raises(ConfigError, match="predictor = true predicts the routes that training replays"):
        load_config(None, {"method": "grpo", "method.predictor": True})


@pytest.mark.parametrize("wants_it", [{"method": "pr2"}, {"method": "r3", "evolution.record": True}], ids=str)
def test_one_mini_step_has_no_evolution_to_record(wants_it):
    with pytest.raises(ConfigError, match=r"training\.mini_steps = 1, and router evolution is what mini-steps 2 to κ"):
        load_config(None, {**wants_it, "training.mini_steps": 1})
    assert load_config(None, {**wants_it, "training.mini_steps": 2}).records_evolution


@pytest.mark.parametrize("stage", STAGE_SECTIONS)
@pytest.mark.parametrize(
    "change",
    [{"storage.root": "s3://elsewhere"}, {"iterations": 50}, {"stages.retries": 9}, {"tracking.experiment": "other"}],
    ids=str,
)
def test_what_a_stage_makes_does_not_depend_on_where_how_long_or_how_it_is_tracked(stage, change):
    assert load_config(None, change).digest(*STAGE_SECTIONS[stage]) == RunConfig().digest(*STAGE_SECTIONS[stage])


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"seed": 1}, {"rollout", "training", "evaluation"}),
        ({"method": "r2"}, {"training"}),
        ({"training.learning_rate": 1e-5}, {"training"}),
        ({"training.lora.rank": 8}, {"training"}),
        ({"evolution.tokens": 16}, {"training"}),
        ({"predictor.ridge": 1.0}, {"predictor"}),
        ({"evaluation.samples": 2}, {"evaluation"}),
        ({"storage.chunk_tokens": 64}, {"routes"}),
        ({"rollout.temperature": 0.7}, {"rollout", "training", "evaluation"}),
    ],
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_a_setting_changes_the_digest_of_the_stages_that_use_it(change, stages):
    changed = load_config(None, change)
    different = {
        stage for stage, parts in STAGE_SECTIONS.items() if changed.digest(*parts) != RunConfig().digest(*parts)
    }
    assert different == stages


def test_a_key_at_its_default_leaves_the_digest_as_it_was_before_the_key_was_known():
    assert load_config(None, {"predictor.memory": 0.9}).digest("predictor") == RunConfig().digest("predictor")
    assert load_config(None, {"training.lora.rank": 0}).digest("training") == RunConfig().digest("training")


def test_adapters_are_of_no_router():
    with pytest.raises(ConfigError, match=r"mlp\.gate would be routers.*set training\.lora\.train_routers = true"):
        load_config(None, {"training.lora.rank": 8, "training.lora.targets": ["q_proj", "mlp.gate"]})


@pytest.mark.parametrize("key", [{"alpha": 8}, {"targets": ["q_proj"]}, {"train_routers": True}], ids=str)
def test_settings_of_adapters_without_a_rank_are_refused(key):
    with pytest.raises(ConfigError, match=r"training\.lora: rank = 0 trains all weights.*give a rank"):
        parse_config({"training": {"lora": key}})


def test_a_config_is_read_back_from_run_json_as_it_was():
    config = load_config(None, {"method": "gspo", "training.adam_betas": [0.9, 0.95], "training.lora.rank": 8})
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_deployments_parameters_may_name_a_preset_or_give_a_table() -> None:
    from prefect.utilities.schema_tools.validation import ValidationError, validate

    from flows.train import train

    schema = train.parameters.model_dump()
    for method in ("grpo", {"name": "r3", "policy_loss": "gspo"}):
        validate({"config": {"method": method}}, schema, raise_on_error=True)
    with pytest.raises(ValidationError):
        validate({"config": {"method": "r4"}}, schema, raise_on_error=True)


@pytest.mark.parametrize("root", ["s3://", "s3:///", "gs://"])
def test_a_root_without_a_bucket_is_refused(root):
    with pytest.raises(ConfigError, match="names no bucket"):
        load_config(None, {"storage.root": root})
