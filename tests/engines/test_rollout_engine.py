"""vLLM as rollout engine, in float32, against transformers and against itself."""

import os
import random
import shutil
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from models import assert_same, greedy, reference, same_sets
from predictors import (
    weights_of,
    write_weights,
)
from rollout_calls import CONFIG, LONGEST_PROMPT
from rollouts import TOLERANCE, assert_as_transformers, generate, held, load
from training_calls import make_config, random_batch

from moe_replay.engines.pool import EnginePool
from moe_replay.engines.process import no_progress
from moe_replay.engines.rollout import Request, shares_of
from moe_replay.errors import ConfigError, EngineFailed, EngineLost, RoutingMismatch
from moe_replay.sections import TrainingConfig

EOS_ID = 1


def ask(text: str, seed: int = 0) -> Request:
    return Request([{"role": "user", "content": text}], seed)


def long_texts(number: int) -> list[str]:
    """Sums with a preface that fills two blocks of the prefix cache."""
    drawn = random.Random(2)
    preface = "".join(drawn.choice("0123456789+= ") for _ in range(280))
    return [preface + f"{drawn.randrange(100, 1000)}+{drawn.randrange(100, 1000)}=" for _ in range(number)]


@pytest.fixture(scope="module")
def pool(perturbed, tmp_path_factory) -> Iterator[EnginePool]:
    """Engines that start from the perturbed model."""
    pool = EnginePool(perturbed, "perturbed", CONFIG, TrainingConfig(), tmp_path_factory.mktemp("logs"))
    pool.rollout()  # starts in the background
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def long_questions() -> list[Request]:
    """Six long problems with one preface, three times each: they share blocks of the prefix cache in one batch."""
    return [ask(text, seed) for seed, text in enumerate(text for text in long_texts(6) for _ in range(3))]


# Routes and log-probs


def test_the_engine_knows_its_model(embedded):
    num_experts, top_k, layers, block_size = embedded.call("rollout_calls:describe", no_progress)
    assert (num_experts, top_k, layers) == (16, 2, (0, 1, 2, 3))
    assert 2 * block_size < len(long_texts(1)[0]) <= LONGEST_PROMPT


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_routes_are_those_of_transformers(embedded, assets, questions, temperature):
    assert_as_transformers(generate(embedded, questions, temperature), assets.model, temperature)


def test_row_t_is_the_route_of_token_t(embedded, assets, questions):
    right = shifted = total = 0
    for response in generate(embedded, questions):
        captured = response.trace.ids_TLK
        expected = reference(assets.model, response.prompt_ids, response.response_ids, 1.0).ids_TLK
        right += same_sets(captured[:-1], expected[:-1]).sum()
        shifted += same_sets(captured[:-2], expected[1:-1]).sum()
        total += captured[:-1, :, 0].size
    assert right > 0.999 * total
    assert shifted < 0.5 * total


def test_prompts_that_share_cached_blocks_have_routes_and_log_probs_of_their_own(embedded, assets, long_questions):
    """18 prompts of 288 tokens are also more than one step of the scheduler takes."""
    assert_as_transformers(generate(embedded, long_questions), assets.model)


def test_greedy_responses_are_those_of_transformers(embedded, assets, questions):
    responses = generate(embedded, questions[::4], 0.0)
    for response in responses:
        assert response.response_ids == greedy(assets.model, response.prompt_ids, CONFIG.max_response_tokens)


def test_a_response_ends_with_the_end_token_unless_truncated(embedded, questions, long_questions):
    responses = generate(embedded, questions + long_questions)
    assert {response.truncated for response in responses} == {True, False}
    for response in responses:
        if response.truncated:
            assert len(response.response_ids) == CONFIG.max_response_tokens
            assert EOS_ID not in response.response_ids
        else:
            assert response.response_ids.index(EOS_ID) == len(response.response_ids) - 1


def test_shares_are_sampled_one_after_the_other_and_told_as_one_batch(embedded, questions):
    responses, told = embedded.call("rollout_calls:generate_in_shares", no_progress, questions, 1.0, 12)
    parts = [generate(embedded, questions[part]) for part in shares_of(len(questions), 12)]
    assert [len(part) for part in parts] == [12, 12, 8]
    assert_same(responses, [response for part in parts for response in part])
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (32, 32)


def test_no_requests_give_no_responses(embedded):
    assert generate(embedded, []) == []


# Repetition


def test_the_same_requests_give_the_same_bytes(embedded, questions, long_questions):
    requests = questions + long_questions
    assert_same(generate(embedded, requests), generate(embedded, requests))


def test_a_response_depends_on_its_seed_and_not_on_its_neighbours(embedded, questions):
    straight = generate(embedded, questions)
    order = random.Random(4).sample(range(len(questions)), len(questions))
    turned = generate(embedded, [questions[i] for i in order])
    alone = generate(embedded, questions[5:6])
    for position, number in [*enumerate(order), (None, 5)]:
        other = alone[0] if position is None else turned[position]
        assert other.response_ids == straight[number].response_ids
        np.testing.assert_allclose(other.log_probs, straight[number].log_probs, rtol=0, atol=TOLERANCE)
    same_prompt = {
        tuple(response.response_ids) for response in generate(embedded, [ask("123+456=", s) for s in range(16)])
    }
    assert len(same_prompt) > 1


# Prompts


@pytest.mark.parametrize("length", [LONGEST_PROMPT, LONGEST_PROMPT + 1])
def test_a_prompt_is_taken_up_to_the_limit_and_refused_beyond(embedded, length):
    requests = [ask("1+1="), ask("9" * length)]
    if length == LONGEST_PROMPT:
        assert [len(response.prompt_ids) for response in generate(embedded, requests)] == [4, length]
    else:
        with pytest.raises(ConfigError, match=r"prompt 1 of the batch has 301 tokens, .* 1 to 300; .*'9999"):
            generate(embedded, requests)


def test_an_empty_prompt_is_refused(embedded):
    with pytest.raises(ConfigError, match="prompt 0 of the batch has 0 tokens"):
        generate(embedded, [ask("")])


# Weights


@pytest.mark.slow
def test_an_engine_killed_at_work_is_lost_and_the_next_one_works(pool, questions):
    first = pool.rollout()
    with pytest.raises(EngineLost, match=r"rollout engine .* exit code -9"):
        first.call("rollout_calls:generate", lambda *_: os.kill(first.pid, signal.SIGKILL), questions, 1.0)
    fresh = pool.rollout()
    assert fresh.pid != first.pid
    assert len(generate(fresh, questions)) == len(questions)


def test_swapped_weights_equal_a_fresh_engine_and_come_back_exactly(
    embedded, pool, assets, perturbed, questions, long_questions
):
    requests = questions + long_questions
    first = generate(embedded, requests)
    assert load(embedded, perturbed, "perturbed") == "perturbed"
    swapped = generate(embedded, requests)
    assert_same(swapped, generate(pool.rollout(), requests))
    assert_as_transformers(swapped, perturbed)
    changed = [
        not same_sets(a.trace.ids_TLK[:8], b.trace.ids_TLK[:8]).all() for a, b in zip(first, swapped, strict=True)
    ]
    assert all(changed)
    load(embedded, assets.model, "embedded")
    assert_same(generate(embedded, requests), first)


def test_weights_held_already_are_not_loaded_again(embedded, questions, tmp_path):
    before = generate(embedded, questions)
    assert load(embedded, tmp_path / "nowhere", "embedded") == "embedded"
    assert_same(generate(embedded, questions), before)


def test_weights_that_cannot_be_loaded_are_not_taken_for_loaded(embedded, assets, questions, tmp_path):
    before = generate(embedded, questions)
    shutil.copytree(assets.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError):
        load(embedded, tmp_path / "model", "broken")
    load(embedded, assets.model, "embedded")
    assert_same(generate(embedded, questions), before)


def test_a_checkpoint_of_the_trainer_loads_and_both_engines_agree(embedded, bench, assets, questions, tmp_path):
    bench.call("training_calls:open_model", no_progress, assets.model, make_config({"learning_rate": 1e-3}))
    for _ in range(3):
        bench.call("training_calls:step", no_progress, random_batch(), None)
    bench.call("training_calls:save", no_progress, tmp_path)
    load(embedded, tmp_path / "huggingface", "trained")
    responses = generate(embedded, questions)
    assert_as_transformers(responses, tmp_path / "huggingface")
    batch = random_batch()
    scored = bench.call(
        "training_calls:score",
        no_progress,
        type(batch)(
            [r.prompt_ids for r in responses], [r.response_ids for r in responses], batch.old_NS, batch.advantages_NS
        ),
        [response.trace for response in responses],
    )
    for response, log_probs in zip(responses, scored.log_probs, strict=True):
        np.testing.assert_allclose(response.log_probs, log_probs, rtol=0, atol=TOLERANCE)


def test_weights_that_end_midway_leave_nothing_of_them_behind(embedded, assets, perturbed, questions, tmp_path):
    """The queries of each layer come from the first file, keys and values never do."""
    before = generate(embedded, questions)
    tensors = weights_of(perturbed)
    queries = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    folder = write_weights(perturbed, queries, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    (folder / "model-2-of-2.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{       ")
    with pytest.raises(EngineFailed):
        load(embedded, folder, "broken")
    assert held(embedded) == (None, None, None, None)
    load(embedded, assets.model, "embedded")
    assert_same(generate(embedded, questions), before)


# Capture that isn't


def test_an_engine_whose_kernel_reports_no_routes_is_refused(embedded, assets, questions):
    with pytest.raises(RoutingMismatch, match=r"names an expert twice: \[0, 0\]"):
        embedded.call("rollout_calls:generate_silently", no_progress, assets.model, questions)
    assert len(generate(embedded, questions)) == len(questions)
