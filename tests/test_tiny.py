import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay import tiny
from moe_replay.data import rewards
from moe_replay.data.prompts import PromptTable
from moe_replay.errors import ConfigError, ReplayError

FEW_STEPS = tiny.Recipe(max_steps=2, judge_every=2, target_accuracy=0.0, train_rows=8, benchmark_rows=4)
CHILD = """
import sys, time
from pathlib import Path
from moe_replay import tiny
recipe = tiny.Recipe(max_steps=2, judge_every=2, target_accuracy=0.0, train_rows=8, benchmark_rows=4)
"""


def silent(done: int, total: int, text: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return home, tiny.prepare(home, silent, FEW_STEPS)


def test_the_same_recipe_makes_the_same_bytes_whatever_torch_was_set_to(few_steps, tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    try:
        again = tiny.prepare(tmp_path, silent, FEW_STEPS)
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.equal(torch.random.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)
    _, first = few_steps
    assert contents(again.model.parent) == contents(first.model.parent)
    assert "model/model.safetensors" in contents(first.model.parent)


def test_another_seed_makes_another_model(few_steps, tmp_path):
    _, first = few_steps
    other = tiny.prepare(tmp_path, silent, replace(FEW_STEPS, seed=1))
    assert (other.model / "model.safetensors").read_bytes() != (first.model / "model.safetensors").read_bytes()
    assert other.train.read_bytes() != first.train.read_bytes()


def test_what_is_cached_is_returned_without_importing_torch(few_steps):
    home, first = few_steps
    program = (
        CHILD + "assets = tiny.prepare(Path(sys.argv[1]), None, recipe); print(assets.model)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", program, home], check=True, capture_output=True, text=True)
    assert child.stdout.strip() == str(first.model)


def test_train_and_benchmark_are_disjoint_prompts_with_known_scorers(few_steps):
    _, assets = few_steps
    train, benchmark = PromptTable.open(assets.train), PromptTable.open(assets.benchmark)
    assert (len(train), len(benchmark)) == (8, 4)
    questions = [{prompt.messages[0]["content"] for prompt in table.rows()} for table in (train, benchmark)]
    assert not questions[0] & questions[1]
    rewards.require_known_sources(train.data_sources() | benchmark.data_sources())


def test_a_killed_preparation_leaves_nothing_visible_and_the_next_one_succeeds(tmp_path):
    stuck = "lambda *_: (print('half-made', flush=True), time.sleep(600))"
    command = [sys.executable, "-c", f"{CHILD}\ntiny.prepare(Path(sys.argv[1]), {stuck}, recipe)", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half-made\n"
        child.send_signal(signal.SIGKILL)
    assert list(tmp_path.rglob("train.parquet"))
    assert not (tmp_path / "embedded" / FEW_STEPS.digest()).exists()
    assets = tiny.prepare(tmp_path, silent, FEW_STEPS)
    assert len(PromptTable.open(assets.benchmark)) == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_of_two_processes_at_once_one_makes_the_model_and_both_get_it(tmp_path):
    program = CHILD + (
        "print('asking', flush=True)\n"
        "assets = tiny.prepare(Path(sys.argv[1]), None, recipe); print((assets.model / 'model.safetensors').is_file())"
    )
    others = []

    def ask_elsewhere(done: int, total: int, text: str) -> None:
        if done == 0:
            command = [sys.executable, "-c", program, tmp_path]
            others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert others[0].stdout.readline() == "asking\n"
        assert others[0].poll() is None

    tiny.prepare(tmp_path, ask_elsewhere, FEW_STEPS)
    (other,) = others
    assert other.communicate()[0] == "True\n"
    assert other.returncode == 0


def test_a_warm_up_short_of_its_target_is_an_error_and_leaves_nothing_visible(tmp_path):
    recipe = replace(FEW_STEPS, target_accuracy=1.0)
    with pytest.raises(ReplayError, match="after 2 steps, short of 100%"):
        tiny.prepare(tmp_path, silent, recipe)
    assert not (tmp_path / "embedded" / recipe.digest()).exists()


def test_a_home_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MOE_REPLAY_HOME"):
        tiny.prepare(tmp_path / "file", silent, FEW_STEPS)


def test_every_part_of_a_recipe_is_in_its_digest():
    recipes = [FEW_STEPS, *tiny.RECIPES.values()]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes) == 3


@pytest.fixture(scope="module")
def tokenizer(few_steps):
    from transformers import AutoTokenizer

    _, assets = few_steps
    return AutoTokenizer.from_pretrained(assets.model)


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.sampled_from(tiny.CHARACTERS), max_size=40))
def test_text_survives_the_saved_tokenizer_with_one_token_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_the_chat_template_joins_messages_and_adds_nothing(tokenizer):
    messages = [{"role": "system", "content": "Add. "}, {"role": "user", "content": "123+989="}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "Add. 123+989="
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]


def test_the_embedded_model_answers_about_two_in_five_of_the_benchmark(assets):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(assets.model)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    assert model.dtype == torch.float32
    assert 0.85e6 < model.num_parameters() < 0.95e6
    assert json.loads((assets.model / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id

    prompts = PromptTable.open(assets.benchmark).take(64)
    inputs = tokenizer.apply_chat_template(
        [prompt.messages for prompt in prompts], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    outputs = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=8, num_return_sequences=8)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = [prompt for prompt in prompts for _ in range(8)]
    scores = [
        rewards.score(prompt.data_source, text, prompt.ground_truth, prompt.extra_info)
        for prompt, text in zip(asked, texts, strict=True)
    ]
    assert 0.3 < sum(scores) / len(scores) < 0.6
