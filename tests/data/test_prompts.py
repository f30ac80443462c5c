import hashlib
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.data.prompts import Prompt, PromptTable, write_prompts
from moe_replay.errors import ConfigError


def record(number: int, **changes) -> dict:
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {number}"}],
        "data_source": "openai/gsm8k",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number)},
        "extra_info": {"index": number, "nested": {"tags": ["a", "b"]}},
        **changes,
    }


def write(path: Path, records: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def table_of(size: int) -> PromptTable:
    with tempfile.TemporaryDirectory() as folder:
        return PromptTable.open(write(Path(folder) / "prompts.parquet", [record(n) for n in range(size)]))


def test_rows_of_verls_schema_are_read_with_nested_extra_info(tmp_path):
    table = PromptTable.open(write(tmp_path / "a.parquet", [record(n) for n in range(3)]))
    assert list(table.rows())[2] == Prompt(
        row=2,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 2"}],
        data_source="openai/gsm8k",
        ground_truth="2",
        extra_info={"index": 2, "nested": {"tags": ["a", "b"]}},
    )


def test_extra_info_may_be_json_text(tmp_path):
    path = write(tmp_path / "a.parquet", [record(0, extra_info=json.dumps({"index": 7}))])
    assert PromptTable.open(path).take(1)[0].extra_info == {"index": 7}


@pytest.mark.parametrize("text", ["{index: 7}", "[7]"])
def test_extra_info_text_that_is_no_json_object_is_refused_at_once(tmp_path, text):
    path = write(tmp_path / "a.parquet", [record(0, extra_info="{}"), record(1, extra_info=text)])
    with pytest.raises(ConfigError, match="extra_info in row 1"):
        PromptTable.open(path)


def test_extra_info_may_be_absent_or_null(tmp_path):
    bare = {key: value for key, value in record(0).items() if key != "extra_info"}
    assert PromptTable.open(write(tmp_path / "a.parquet", [bare])).take(1)[0].extra_info == {}
    assert PromptTable.open(write(tmp_path / "b.parquet", [record(0, extra_info=None)])).take(1)[0].extra_info == {}


def test_ground_truth_may_be_a_struct(tmp_path):
    truth = {"target": ["Paris", "paris"]}
    path = write(tmp_path / "a.parquet", [record(0, reward_model={"style": "rule", "ground_truth": truth})])
    assert PromptTable.open(path).take(1)[0].ground_truth == truth


def test_digest_is_the_sha256_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", [record(0)])
    assert PromptTable.open(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_missing_columns_are_named_with_those_seen_and_the_schema(tmp_path):
    path = write(tmp_path / "a.parquet", [{"question": "1+1", "prompt": record(0)["prompt"]}])
    with pytest.raises(ConfigError) as refusal:
        PromptTable.open(path)
    assert "lacks data_source, reward_model" in str(refusal.value)
    assert "its columns are question, prompt" in str(refusal.value)
    assert "list<struct<role: string, content: string>>" in str(refusal.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("prompt", "What is 1+1?"),
        ("prompt", [{"role": "user", "content": [{"type": "image"}]}]),
        ("data_source", 3),
        ("reward_model", {"style": "rule"}),
        ("extra_info", [1, 2]),
    ],
)
def test_a_column_of_the_wrong_kind_is_refused(tmp_path, column, value):
    path = write(tmp_path / "a.parquet", [record(0, **{column: value})])
    with pytest.raises(ConfigError, match=f"column {column} of"):
        PromptTable.open(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": None},
        {"prompt": []},
        {"prompt": [{"role": "user", "content": None}]},
        {"data_source": None},
        {"reward_model": None},
    ],
)
def test_a_row_without_what_every_row_needs_is_refused(tmp_path, changes):
    path = write(tmp_path / "a.parquet", [record(0), record(1, **changes)])
    with pytest.raises(ConfigError, match=r"have no|without messages"):
        PromptTable.open(path)


def test_a_file_that_is_absent_empty_or_not_parquet_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no Parquet file"):
        PromptTable.open(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("PAR1 is not all it takes")
    with pytest.raises(ConfigError, match="can't be read as Parquet"):
        PromptTable.open(tmp_path / "text.parquet")
    pq.write_table(pa.Table.from_pylist([record(0)]).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match="has no rows"):
        PromptTable.open(tmp_path / "empty.parquet")


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [record(n) for n in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="can't be read as Parquet"):
        PromptTable.open(path)


def test_written_prompts_read_back(tmp_path):
    prompts = list(table_of(5).rows())
    write_prompts(tmp_path / "copy.parquet", prompts)
    assert list(PromptTable.open(tmp_path / "copy.parquet").rows()) == prompts
    assert [path.name for path in tmp_path.iterdir()] == ["copy.parquet"]


def test_writing_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't write"):
        write_prompts(tmp_path / "absent" / "a.parquet", table_of(1).take(1))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), count=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_iterations_cover_each_epoch_exactly_once(size, count, seed):
    table = table_of(size)
    iterations = -(-3 * size // count)
    rows = [prompt.row for n in range(iterations) for prompt in table.draw(n, count, seed)]
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 40), count=st.integers(1, 50), iteration=st.integers(0, 10**6), seed=st.integers(0, 9))
def test_a_draw_depends_on_its_arguments_alone(size, count, iteration, seed):
    fresh, used = table_of(size), table_of(size)
    used.draw(3, 7, 1)
    assert fresh.draw(iteration, count, seed) == used.draw(iteration, count, seed)


def test_seeds_and_epochs_order_rows_differently():
    table = table_of(50)
    orders = [[prompt.row for prompt in table.draw(n, 50, seed)] for n in (0, 1) for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_take_gives_the_first_rows_or_all():
    table = table_of(4)
    assert [prompt.row for prompt in table.take(2)] == [0, 1]
    assert [prompt.row for prompt in table.take(9)] == [0, 1, 2, 3]
    assert table.data_sources() == {"openai/gsm8k"}
