import subprocess
import sys

import pytest

from moe_replay.data import addition, reasoning, rewards
from moe_replay.data.prompts import PromptTable
from moe_replay.errors import ConfigError


@pytest.mark.parametrize(
    ("response", "reward"), [("2111", 1.0), ("2112", 0.0), ("211", 0.0), ("21111", 0.0), ("", 0.0)]
)
def test_addition_is_scored_by_exact_match(response, reward):
    assert rewards.score(addition.DATA_SOURCE, response, "2111", {}) == reward


@pytest.fixture(scope="module")
def chain_sum(tmp_path_factory):
    path = tmp_path_factory.mktemp("reasoning") / "chain_sum.parquet"
    reasoning.write_parquet("chain_sum", path, size=1, seed=0)
    return PromptTable.open(path).take(1)[0]


@pytest.mark.parametrize(
    ("response", "reward"), [("{}", 1.0), (" {}\n", 1.0), ("Let me see. <answer>{}</answer>", 1.0), ("<answer>x", 0.0)]
)
def test_reasoning_gym_scores_the_last_answer(chain_sum, response, reward):
    text = response.format(chain_sum.ground_truth)
    assert rewards.score(chain_sum.data_source, text, chain_sum.ground_truth, chain_sum.extra_info) == reward


def test_an_answer_that_a_scorer_chokes_on_is_worth_nothing(tmp_path):
    reasoning.write_parquet("prime_factorization", tmp_path / "a", size=1, seed=0)
    prompt = PromptTable.open(tmp_path / "a").take(1)[0]
    assert rewards.score(prompt.data_source, "garbage", prompt.ground_truth, prompt.extra_info) == 0.0


def test_a_reasoning_gym_row_without_its_entry_is_refused(chain_sum):
    with pytest.raises(ConfigError, match=r"no extra_info.entry"):
        rewards.score(chain_sum.data_source, "1", "1", {"index": 0})


def test_gsm8k_is_scored_by_verl():
    assert rewards.score("openai/gsm8k", "6 times 7 is\n#### 42", "42", {}) == 1.0
    assert rewards.score("openai/gsm8k", "6 times 7 is 42", "42", {}) == 0.0


def test_a_scorer_of_verl_that_answers_with_a_dict_gives_its_score():
    assert rewards.score("math_dapo", "Answer: 42", "42", {}) == 1.0
    assert rewards.score("math_dapo", "Answer: 41", "42", {}) == -1.0


def test_known_sources_are_accepted():
    rewards.require_known_sources(
        {addition.DATA_SOURCE, "reasoning_gym/chain_sum", "openai/gsm8k", "aime2024", "codecontests"}
    )


def test_unknown_sources_are_refused_with_those_known():
    with pytest.raises(ConfigError) as refusal:
        rewards.require_known_sources({"openai/gsm8k", "my/data", "gsm8k"})
    assert "no scorer for data_source 'gsm8k', 'my/data'" in str(refusal.value)
    for known in (addition.DATA_SOURCE, "reasoning_gym/<task>", "openai/gsm8k", "lighteval/MATH", "aime*"):
        assert known in str(refusal.value)


def test_a_source_whose_scorer_lacks_a_package_is_refused_with_its_name():
    with pytest.raises(ConfigError, match=r"hiyouga/geometry3k.*mathruler"):
        rewards.require_known_sources({"hiyouga/geometry3k"})


def test_scoring_an_unknown_source_is_refused():
    with pytest.raises(ConfigError, match="no scorer for data_source 'my/data'"):
        rewards.score("my/data", "1", "1", {})


def test_an_unknown_reasoning_gym_task_is_refused():
    with pytest.raises(ConfigError, match="did you mean chain_sum"):
        rewards.require_known_sources({"reasoning_gym/chain_sun"})


def test_sources_of_our_own_are_checked_and_scored_without_importing_verl():
    program = (
        "import sys; from moe_replay.data import rewards; source = 'moe_replay/addition';"
        "rewards.require_known_sources({source}); assert rewards.score(source, '1', '1', {}) == 1.0;"
        "assert not {'verl', 'torch', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
