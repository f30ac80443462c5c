import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.data import reasoning
from moe_replay.data.prompts import PromptTable
from moe_replay.errors import ConfigError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
entries = st.dictionaries(
    st.text(max_size=12) | st.sampled_from(["__tuple__", "__items__"]),
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.integers() | st.text(max_size=3) | st.tuples(st.integers()), inner, max_size=3)
        ),
        max_leaves=10,
    ),
    max_size=4,
)


@given(entry=entries)
def test_entries_survive_json_with_tuples_and_any_keys(entry):
    assert reasoning.decode_entry(reasoning.encode_entry(entry)) == entry


def test_same_task_size_and_seed_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        reasoning.write_parquet("chain_sum", tmp_path / name, size=5, seed=7)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(PromptTable.open(tmp_path / "a")) == 5


def test_an_unknown_task_is_refused_with_close_matches(tmp_path):
    with pytest.raises(ConfigError, match=r"no task 'chain_sums'.*did you mean chain_sum"):
        reasoning.write_parquet("chain_sums", tmp_path / "a", size=5, seed=7)
    assert not list(tmp_path.iterdir())


def test_a_task_that_needs_settings_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't make 'composite'"):
        reasoning.write_parquet("composite", tmp_path / "a", size=5, seed=7)


def test_an_empty_file_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        reasoning.write_parquet("chain_sum", tmp_path / "a", size=0, seed=7)


@pytest.mark.parametrize("task", ["chain_sum", "rearc", "propositional_logic", "game_of_life"])
def test_a_problem_read_back_is_scored_as_the_task_scores_it(tmp_path, task):
    import reasoning_gym

    reasoning.write_parquet(task, tmp_path / "a", size=2, seed=7)
    dataset = reasoning_gym.create_dataset(task, size=2, seed=7)
    for prompt, entry in zip(PromptTable.open(tmp_path / "a").rows(), dataset, strict=True):
        answer = prompt.ground_truth or ""
        assert reasoning.score(task, answer, prompt.extra_info) == dataset.score_answer(answer, entry)
