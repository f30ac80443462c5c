import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from moe_replay.archive.artifacts import RunStore
from moe_replay.config import RunConfig
from moe_replay.data import addition
from moe_replay.engines.process import no_progress
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.plan import stored_config
from moe_replay.preparation import (
    folder_digest,
    package_versions,
    preflight,
    prepare,
    require_mixture_of_experts,
)


def changed(config: RunConfig, **overrides) -> RunConfig:
    """The config with dotted keys, written with two underscores, set."""
    document = config.model_dump(mode="json")
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            document[section][name] = value
        else:
            document[section] = value
    return RunConfig.model_validate(document)


def test_a_sound_run_passes_and_nothing_is_written(config, tmp_path):
    preflight(config, "run-1")
    assert list((tmp_path / "runs").iterdir()) == []
    assert list((tmp_path / "home").iterdir()) == []


def test_a_prepared_run_is_written_down_and_found_again(config):
    run = prepare(config, "run-1", no_progress)
    assert prepare(config, "run-1", no_progress) == run
    assert stored_config(run.store()) == changed(config, storage__root=None)
    document = run.store().read_run()
    assert document["model_sha256"] == run.model_sha256
    assert document["about"]["versions"] == package_versions()


def test_a_root_is_no_part_of_what_run_json_says(config, tmp_path):
    run = prepare(config, "run-1", no_progress)
    assert str(tmp_path / "runs") not in json.dumps(run.store().read_run())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training__attention": "flash_attention_2", "training__dtype": "bfloat16"}, r"takes a GPU and the package"),
        ({"training__engine": "megatron", "training__packing": True}, r"'megatron' takes .*which this machine has not"),
        ({"resources__rollout_tensor_parallel_size": 3}, r"rollout_tensor_parallel_size = 3 .* has 32; .* 1, 2, 4"),
    ],
)
def test_hardware_that_cannot_do_it_is_refused_before_the_run_exists(config, change, told):
    with pytest.raises(ConfigError, match=told):
        prepare(changed(config, **change), "run-1", no_progress)
    assert not RunStore(config.storage.root or "", "run-1").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"iterations": 9}, "iterations (5 -> 9)"),
        ({"training__learning_rate": 1e-5}, "training.learning_rate (0.0001 -> 1e-05)"),
        ({"method": "grpo"}, "method.route_source ('rollout' -> 'none')"),
        ({"evaluation__benchmarks": {}}, "evaluation.benchmarks"),
    ],
)
def test_a_run_that_exists_with_another_config_is_refused_with_what_differs(config, change, told):
    prepare(config, "run-1", no_progress)
    with pytest.raises(ConfigError) as caught:
        preflight(changed(config, **change), "run-1")
    assert told in str(caught.value)
    assert "give another name" in str(caught.value)


def test_adapters_that_the_model_has_no_place_for_are_refused_before_the_run_exists(config):
    lora = {"rank": 8, "targets": ["self_attn.query"]}
    with pytest.raises(ConfigError, match=r"no weight of the model's decoder layers ends in 'self_attn\.query'"):
        prepare(changed(config, training__lora=lora), "run-1", no_progress)
    assert not RunStore(config.storage.root or "", "run-1").exists()
    assert prepare(changed(config, training__lora={"rank": 8}), "run-1", no_progress).config.training.lora.rank == 8


def test_a_model_that_cannot_be_packed_or_shared_out_is_refused_before_the_run_exists(config):
    packed = changed(config, training__packing=True, training__mini_steps=1)
    sharing = {"training_world_size": 3, "training_sequence_parallel_size": 3}
    with pytest.raises(ConfigError, match=r"training_sequence_parallel_size = 3 ranks .* set it to one of 1, "):
        prepare(changed(packed, resources=sharing), "run-1", no_progress)
    assert not RunStore(config.storage.root or "", "run-1").exists()
    assert prepare(packed, "run-1", no_progress).config.training.packing


def test_the_model_is_built_once_to_look_at_adapters_and_packing(config, monkeypatch):
    built, build = [], AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *args, **of: (built.append(args), build(*args, **of))[1]
    )
    both = changed(config, training__lora={"rank": 8}, training__packing=True, training__mini_steps=1)
    prepare(both, "run-1", no_progress)
    assert len(built) == 1


@pytest.mark.parametrize(
    ("family", "attention", "told"),
    [
        (
            "gpt_oss",
            "sdpa",
            r"GptOssForCausalLM has; set .*'flash_attention_2' \(.* 'kernels-community/vllm-.* package kernels too",
        ),
        ("deepseek_v4", "sdpa", r"DeepseekV4ForCausalLM has; nor has it 'flash_attention_2'.*choose another model"),
        ("llama4_text", "flash_attention_2", r"Llama4ForCausalLM has; set training\.attention = 'sdpa', or choose"),
    ],
)
def test_attention_that_the_models_family_has_not_is_refused_before_the_run_exists(
    config, tmp_path, family, attention, told
):
    document = {"model_type": family, "num_experts": 8, "num_local_experts": 8, "num_hidden_layers": 2}
    (tmp_path / "model/config.json").write_text(json.dumps(document))
    if attention == "flash_attention_2":  # as on a cluster whose ranks have what this machine has not
        training = {"attention": attention, "dtype": "bfloat16"}
        config = changed(config, training=training, resources={"training_world_size": 2})
    with pytest.raises(ConfigError, match=told):
        prepare(config, "run-1", no_progress)
    assert not RunStore(config.storage.root or "", "run-1").exists()


@pytest.mark.parametrize("change", [{"stages__retries": 7}, {"tracking__experiment": "elsewhere"}])
def test_how_a_run_is_retried_and_tracked_may_change(config, change):
    prepare(config, "run-1", no_progress)
    assert prepare(changed(config, **change), "run-1", no_progress).config == changed(config, **change)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model/model.safetensors", "model_sha256"),
        ("train.parquet", "train_sha256"),
        ("test.parquet", "benchmarks_sha256.addition"),
    ],
)
def test_a_run_is_not_continued_from_other_weights_or_data(config, tmp_path, file, told):
    prepare(config, "run-1", no_progress)
    if file.endswith(".parquet"):
        addition.write_parquet(tmp_path / file, addition.split_problems(16, 4, seed=1).rest[:5], "train")
    else:
        (tmp_path / file).write_bytes(b"other weights")
    with pytest.raises(ConfigError, match=told):
        prepare(config, "run-1", no_progress)


def test_a_run_json_without_config_is_corrupt(tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"run_id": "run-1"})
    with pytest.raises(ArchiveCorrupt, match="holds no config"):
        stored_config(store)


def test_a_home_in_the_users_folder_names_files_with_a_tilde(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = prepare(changed(config, data__train="~/train.parquet", model__path="~/model"), "run-1", no_progress)
    assert (run.train.path, run.model) == (tmp_path / "train.parquet", tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model__path": "/no/such/model"}, "model.path /no/such/model does not exist"),
        ({"model__path": "."}, "folder without config.json"),
        ({"data__train": "/no/such.parquet"}, "there is no Parquet file at /no/such.parquet"),
        ({"evaluation__benchmarks": {"b": "/no/such.parquet"}}, "there is no Parquet file at /no/such.parquet"),
        ({"storage__root": "nosuch://bucket"}, "no file system serves nosuch://bucket"),
    ],
)
def test_what_is_missing_is_named(config, tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        preflight(changed(config, **change), "run-1")
    assert told in str(caught.value)


def test_a_root_that_cant_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="check the root"):
        preflight(changed(config, storage__root=str(tmp_path / "file" / "runs")), "run-1")


def test_a_home_that_cant_be_made_is_refused(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_REPLAY_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError, match=r"MOE_REPLAY_HOME .* can't be made"):
        preflight(config, "run-1")


@pytest.mark.parametrize("run_id", ["../run", "a/b", "", ".hidden", "a" * 65, "a\nb"])
def test_a_run_id_is_a_name_and_never_a_path(config, tmp_path, run_id):
    with pytest.raises(ConfigError, match="run id"):
        preflight(config, run_id)
    assert not (tmp_path / "runs").exists()


def model_folder(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "document",
    [
        {"num_experts": 8},
        {"num_local_experts": 8},
        {"n_routed_experts": 64},
        {"text_config": {"num_experts": 128}},
        {"num_experts": 0, "text_config": {"num_local_experts": 4}},
    ],
    ids=str,
)
def test_a_mixture_of_experts_is_told_by_its_config(tmp_path, document):
    require_mixture_of_experts(model_folder(tmp_path, json.dumps(document)))


@pytest.mark.parametrize(
    "document", [{}, {"num_experts": 1}, {"num_experts": None}, {"text_config": None}, {"num_experts": "many"}], ids=str
)
def test_a_dense_model_is_refused(tmp_path, document):
    with pytest.raises(ConfigError, match="is dense"):
        require_mixture_of_experts(model_folder(tmp_path, json.dumps(document | {"model_type": "llama"})))


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_model_config_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.json"):
        require_mixture_of_experts(model_folder(tmp_path, text))


def test_a_models_digest_depends_on_names_and_contents_of_its_files_alone(tmp_path):
    def digest(files: dict[str, bytes]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder_digest(folder, no_progress)

    files = {"a": b"1", "b": b"2"}
    assert digest(files) == digest(dict(reversed(files.items()))) == digest(files | {".cache": b"x"})
    assert len({digest(other) for other in (files, {"a": b"1"}, {"a": b"2", "b": b"1"}, {"a": b"1", "c": b"2"})}) == 4


def test_a_prompt_that_is_too_long_is_refused_before_the_run_exists(config, tmp_path):
    with pytest.raises(ConfigError, match=r"row 0 of .*train.parquet has 8 tokens, .* allows 1 to 7"):
        prepare(changed(config, rollout__max_prompt_tokens=7), "run-1", no_progress)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_tokenizer_without_chat_template_is_refused(config, tmp_path):
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        prepare(config, "run-1", no_progress)


def test_data_that_changes_while_the_run_goes_on_is_refused(config, tmp_path):
    run = prepare(config, "run-1", no_progress)
    addition.write_parquet(tmp_path / "train.parquet", addition.split_problems(16, 4, seed=1).train, "train")
    with pytest.raises(ConfigError, match="the run was prepared with"):
        run.train.open()


def test_a_run_of_imported_routes_has_nothing_to_resume(tmp_path):
    store = RunStore(str(tmp_path), "mydump")
    store.create_run({"imported_routes": {"num_experts": 8, "top_k": 2, "layers": [0]}})
    with pytest.raises(ConfigError, match="holds routes that were imported, nothing to train"):
        stored_config(store)
