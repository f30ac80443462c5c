"""What a pool gives its next engines; none is started here."""

import re
from pathlib import Path

import psutil
import pytest

from moe_replay.config import RunConfig
from moe_replay.engines.pool import EnginePool
from moe_replay.errors import ConfigError, EngineStopped, OutOfMemory
from moe_replay.sections import ResourcesConfig


@pytest.fixture
def pool(tmp_path: Path) -> EnginePool:
    config = RunConfig()
    return EnginePool(tmp_path, "weights", config.rollout, config.training, tmp_path)


def test_micro_batches_halve_from_what_failed_down_to_the_longest_sequence(pool: EnginePool) -> None:
    # The batch was smaller than what the config allows: less than that is what has to be less.
    assert pool.take_smaller_micro_batches(OutOfMemory("a pass failed", 300), longest=40) == 150
    assert pool.take_smaller_micro_batches(OutOfMemory("the engine failed"), longest=40) == 75
    assert pool.take_smaller_micro_batches(OutOfMemory("a pass failed", 75), longest=40) == 40
    with pytest.raises(
        ConfigError, match=r"^a pass failed; no smaller micro-batch holds a sequence of up to 40 tokens"
    ):
        pool.take_smaller_micro_batches(OutOfMemory("a pass failed", 40), longest=40)


def test_ranks_that_share_a_sequence_need_hold_their_part_of_it_alone(tmp_path: Path) -> None:
    config = RunConfig()
    resources = ResourcesConfig(training_world_size=2, training_sequence_parallel_size=2)
    pool = EnginePool(tmp_path, "weights", config.rollout, config.training, tmp_path, resources)
    assert pool.take_smaller_micro_batches(OutOfMemory("a pass failed", 40), longest=41) == 21
    with pytest.raises(ConfigError, match=r"up to 41 tokens .* on 2 rank\(s\) that share it"):
        pool.take_smaller_micro_batches(OutOfMemory("a pass failed", 21), longest=41)


def test_engines_that_take_turns_are_not_started_ahead(tmp_path: Path) -> None:
    config = RunConfig()
    pool = EnginePool(tmp_path, "weights", config.rollout, config.training, tmp_path, ResourcesConfig(colocated=True))
    before = psutil.Process().children()
    pool.start()
    assert set(psutil.Process().children()) <= set(before)


def test_a_pool_that_has_ended_starts_no_engine_for_a_stage_that_is_still_at_work(pool: EnginePool) -> None:
    pool.end()
    with pytest.raises(EngineStopped, match="no rollout engine is started any more"):
        pool.rollout()


def test_an_engine_that_can_hold_the_longest_sequence_alone_gets_no_less(pool: EnginePool) -> None:
    with pytest.raises(ConfigError, match=re.escape("rollout.max_prompt_tokens + rollout.max_response_tokens")):
        pool.take_smaller_micro_batches(OutOfMemory("the engine failed"), longest=8192)
