from moe_replay.data import addition
from moe_replay.data.prompts import PromptTable


def test_the_answer_is_the_sum_from_its_last_digit():
    assert addition.question_and_answer(123_989) == ("123+989=", "2111")
    assert addition.question_and_answer(5_007) == ("005+007=", "2100")


def test_splits_are_disjoint_and_together_all_problems():
    split = addition.split_problems(4096, 64, seed=3)
    assert (len(split.train), len(split.benchmark)) == (4096, 64)
    together = {*split.train.tolist(), *split.benchmark.tolist(), *split.rest.tolist()}
    assert together == set(range(addition.NUM_PROBLEMS))
    assert len(split.train) + len(split.benchmark) + len(split.rest) == addition.NUM_PROBLEMS


def test_problems_without_carries_have_only_small_digits():
    split = addition.split_problems(0, 0, seed=0)
    easy = addition.without_carries(split.rest)
    assert len(easy) == 5**6
    assert all(max(addition.question_and_answer(problem)[0][:3]) <= "4" for problem in easy[:100].tolist())


def test_same_seed_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        addition.write_parquet(tmp_path / name, addition.split_problems(32, 8, seed=5).train, "train")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_written_problems_are_prompts_with_their_answers(tmp_path):
    addition.write_parquet(tmp_path / "train.parquet", addition.split_problems(32, 8, seed=5).train, "train")
    for prompt in PromptTable.open(tmp_path / "train.parquet").rows():
        (message,) = prompt.messages
        left, right = message["content"].rstrip("=").split("+")
        assert int(prompt.ground_truth[::-1]) == int(left) + int(right)
        assert prompt.extra_info == {"split": "train", "index": prompt.row}
