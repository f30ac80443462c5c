"""`moe-replay plan` as a user meets it, on the shapes of published models."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_replay.cli.app import app
from moe_replay.errors import ConfigError

MODELS = Path(__file__).parent / "analysis" / "models"


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `moe-replay plan WORDS` in this process; returns what it prints."""
    monkeypatch.setattr("moe_replay.cli.plan.out.width", 140)

    def run(model, *words):
        path = MODELS / f"{model}.json" if isinstance(model, str) else model
        app(["plan", str(path), *words], exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("model", "shape", "raw", "predictor"),
    [
        ("qwen3-30b-a3b", (48, 128, 8, 2048), 512 * 16384 * 48 * 8, 48 * 128 * 2048 * 4),
        ("qwen3-235b-a22b", (94, 128, 8, 4096), 512 * 16384 * 94 * 8, 94 * 128 * 4096 * 4),
        ("deepseek-v3", (58, 256, 8, 7168), 512 * 16384 * 58 * 8, 58 * 256 * 7168 * 4),
        ("olmoe-1b-7b", (16, 64, 8, 2048), 512 * 16384 * 16 * 8, 16 * 64 * 2048 * 4),
        ("mixtral-8x7b", (32, 8, 2, 4096), 512 * 16384 * 32 * 2, 32 * 8 * 4096 * 4),
    ],
)
def test_published_models_have_their_shape_and_sizes(command, model, shape, raw, predictor):
    told = json.loads(command(model, "--json"))
    assert (len(told["layers"]), *(told[key] for key in ("num_experts", "top_k", "hidden_size"))) == shape
    assert [routes["tokens_per_sequence"] for routes in told["routes"]] == [16384, 32768, 65536, 131072]
    assert [routes["raw_bytes"] for routes in told["routes"]] == [raw, 2 * raw, 4 * raw, 8 * raw]
    assert told["evolution"]["predictor_bytes"] == predictor


def test_deepseeks_dense_layers_have_no_routes_but_vllm_captures_them(command):
    told = json.loads(command("deepseek-v3", "--json"))
    assert (told["layers"][0], told["layers"][-1], told["decoder_layers"], told["biased"]) == (3, 60, 61, True)
    assert told["kv_token_bytes"] == 61 * 8
    assert "replay with r2 or r3" in command("deepseek-v3")


def test_the_tables_say_what_is_exact_and_what_was_measured(command):
    told = command("qwen3-30b-a3b", "--tokens", "16K,100")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if "│" in line]
    assert ["raw", "3.22 GB", "19.7 MB", "exact"] in lines
    assert ["archived", "2.06 GB", "12.6 MB", "measured"] in lines
    assert ["raw", "1.01 GB", "exact"] in lines
    assert ["predictor, each of two files", "50.3 MB", "exact"] in lines
    assert "of 8 of 128 experts" in told
    assert told.splitlines()[-1].endswith(" run CONFIG.toml --set model.path=MODEL")


def test_a_runs_settings_are_taken_and_options_go_before_them(command, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        'method = "pr2"\n[rollout]\nprompts = 4\nresponses = 2\nmax_prompt_tokens = 100\nmax_response_tokens = 28\n'
        '[training]\nmini_steps = 2\n[evolution]\ntokens = 64\ndtype = "float32"\n'
        '[storage]\nchunk_tokens = 512\ncodec = "zstd"\nkeep_order = true\n'
    )
    told = json.loads(command("olmoe-1b-7b", "--config", str(config), "--network-mb-s", "100", "--json"))
    assert told["workload"] == {
        "sequences": 8,
        "carried_sequences": 0,
        "mini_steps": 2,
        "codec": "zstd",
        "keep_order": True,
        "chunk_tokens": 512,
        "network_mb_s": 100,
        "evolution_tokens": 64,
        "evolution_dtype": "float32",
    }
    (routes,) = told["routes"]
    assert (routes["tokens_per_sequence"], routes["tokens"], routes["chunks"]) == (128, 1024, 16 * 2)
    assert told["evolution"]["tokens"] == 64
    other = json.loads(command("olmoe-1b-7b", "--config", str(config), "--sequences=16", "--tokens=1K,64", "--json"))
    assert [routes["tokens"] for routes in other["routes"]] == [16 * 1024, 16 * 64]


def test_partial_rollouts_that_a_run_would_refuse_are_refused(command, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[rollout]\nmax_response_tokens = 8\npartial_response_tokens = 8\noversampled_prompts = 4\n")
    with pytest.raises(ConfigError, match="= 8 lets every response reach its end"):
        command("olmoe-1b-7b", "--config", str(config))


def test_what_partial_rollouts_carry_is_told_where_they_are_set(command, tmp_path):
    rollout = "[rollout]\nprompts = 16\nresponses = 4\nmax_prompt_tokens = 24\nmax_response_tokens = 1000\n"
    (tmp_path / "whole.toml").write_text(rollout)
    (tmp_path / "partial.toml").write_text(f"{rollout}partial_response_tokens = 100\noversampled_prompts = 8\n")
    whole, partial = (("olmoe-1b-7b", "--config", str(tmp_path / name)) for name in ("whole.toml", "partial.toml"))
    assert "carried" not in command(*whole)
    told = command(*partial)
    assert "64 sequences an iteration and 32 carried to the next, 4 mini-steps;" in told
    assert "carried to the next, at most" in told
    before, after = (json.loads(command(*words, "--json"))["routes"][0] for words in (whole, partial))
    assert (before["carried_bytes"], after["stored_bytes"]) == (0, before["stored_bytes"])
    assert after["carried_bytes"] == pytest.approx(before["captured_bytes"] / 2 + 32 * 1024 * 14)
    assert after["rollout_peak_bytes"] == before["rollout_peak_bytes"] * 3


def test_a_method_without_a_predictor_records_no_evolution(command, tmp_path):
    (tmp_path / "run.toml").write_text('method = "r3"\n')
    assert "evolution is not recorded" in command("olmoe-1b-7b", "--config", str(tmp_path / "run.toml"))


def test_raw_is_compared_and_never_recommended(command):
    told = command("olmoe-1b-7b", "--codec", "raw")
    assert "an archive is written with expert-set or zstd" in told
    assert told.splitlines()[-1].endswith("--codec expert-set     (what an archive is written with)")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tokens", "16k"], "K for 1024"),
        (["--sequences", "6"], "do not divide 6"),
        (["--chunk-tokens", "0"], "chunk_tokens: Input should be greater"),
        (["--network-mb-s", "0"], "network_mb_s"),
    ],
)
def test_what_cannot_be_sized_is_refused_with_the_way_out(command, words, told):
    with pytest.raises(ConfigError, match=told):
        command("olmoe-1b-7b", *words)


def test_a_dense_model_is_refused(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}')
    with pytest.raises(ConfigError, match="is dense"):
        command(tmp_path)


def test_the_command_loads_no_engine_to_size_a_model():
    program = (
        "import sys\nfrom moe_replay.cli.app import app\n"
        "app(sys.argv[1:], exit_on_error=False, result_action='return_value')\n"
        "assert not {'torch', 'transformers', 'vllm', 'numba'} & set(sys.modules)"
    )
    words = ["plan", str(MODELS / "deepseek-v3.json"), "--json"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_told_next_is_the_run_that_was_planned(command):
    words = ("--mini-steps", "8", "--keep-order", "--evolution-tokens", "8192", "--tokens", "32K")
    settings = "training.mini_steps=8 --set storage.keep_order=true --set evolution.tokens=8192"
    told = command("qwen3-30b-a3b", *words).splitlines()[-1]
    assert told.endswith(f" run CONFIG.toml --set model.path=MODEL --set {settings}")
    config = Path(__file__).parents[1] / "configs" / "qwen3-30b-a3b.toml"
    told = command("qwen3-30b-a3b", "--config", str(config)).splitlines()[-1]
    assert told.endswith(f" run {config} --set model.path=MODEL")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A Hugging Face cache that holds the config of one model."""
    snapshot = tmp_path / "models--allenai--OLMoE-1B-7B-0924/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    shutil.copy(MODELS / "olmoe-1b-7b.json", snapshot / "config.json")
    (tmp_path / "models--allenai--OLMoE-1B-7B-0924/refs").mkdir()
    (tmp_path / "models--allenai--OLMoE-1B-7B-0924/refs/main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_model_of_the_hub_is_planned_by_name_from_the_cache(command, cache):
    told = command(Path("allenai/OLMoE-1B-7B-0924"))
    assert "olmoe: 16 MoE layers of 16, top-8 of 64 experts" in told
    assert told.splitlines()[-1].endswith(" run CONFIG.toml --set model.path=allenai/OLMoE-1B-7B-0924")


def test_a_model_of_the_hub_that_is_not_cached_is_refused_with_what_fetches_its_config(command, cache):
    told = rf"not in the cache {re.escape(str(cache))}; fetch it with: hf download Qwen/Qwen3-30B-A3B config\.json"
    with pytest.raises(ConfigError, match=told):
        command(Path("Qwen/Qwen3-30B-A3B"))


@pytest.mark.parametrize("name", ["no/such/folder", "folder/config.json", "owner/no--name", "model"])
def test_what_is_neither_here_nor_a_name_of_the_hub_is_refused(command, cache, name):
    with pytest.raises(ConfigError, match=f"{name}.* can't be read.*give a Hugging Face model's folder"):
        command(Path(name))
