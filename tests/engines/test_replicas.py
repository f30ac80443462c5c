"""vLLM replicas under Ray, beside one engine that samples the same shares."""

from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from models import write_perturbed

from moe_replay.config import ResourcesConfig, RolloutConfig, load_config
from moe_replay.data.prompts import PromptTable
from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.engines.rollout import Request, Response, shares_of
from moe_replay.errors import ConfigError

CONFIG = RolloutConfig(dtype="float32", share=5)
REQUESTS = 17


def started(assets, replicas: int, log) -> EngineProcess:
    arguments = (assets.model, "embedded", CONFIG, ResourcesConfig(rollout_replicas=replicas))
    return EngineProcess("moe_replay.engines.replicas:make_rollout", arguments, "rollout", log, rollout.ENVIRONMENT)


@pytest.fixture(scope="module")
def requests(assets) -> list[Request]:
    prompts = PromptTable.open(assets.benchmark).take(REQUESTS)
    return [Request(prompt.messages, seed) for seed, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def single(assets, tmp_path_factory) -> Iterator[EngineProcess]:
    engine = started(assets, 1, tmp_path_factory.mktemp("logs") / "rollout.log")
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def replicas(assets, single, tmp_path_factory) -> Iterator[EngineProcess]:
    """Two; when they are stopped, no process of theirs or of Ray's stays."""
    engine = started(assets, 2, tmp_path_factory.mktemp("logs") / "rollout.log")
    yield engine
    family = psutil.Process(engine.pid).children(recursive=True)
    assert len(family) > 2
    engine.stop()
    assert psutil.wait_procs(family, timeout=20)[1] == []


def generate(engine: EngineProcess, requests: list[Request], function: str = "generate") -> list[Response]:
    return engine.call(f"rollout_calls:{function}", no_progress, requests, 1.0)


def assert_same(one: list[Response], other: list[Response]) -> None:
    """To the last bit."""
    for a, b in zip(one, other, strict=True):
        assert (a.prompt_ids, a.response_ids, a.log_probs) == (b.prompt_ids, b.response_ids, b.log_probs)
        np.testing.assert_array_equal(a.trace.ids_TLK, b.trace.ids_TLK)


def test_an_engine_samples_share_by_share(single, requests):
    parts = [generate(single, requests[share]) for share in shares_of(REQUESTS, CONFIG.share)]
    assert [len(part) for part in parts] == [5, 5, 5, 2]
    assert_same(generate(single, requests), [response for part in parts for response in part])


def test_replicas_give_what_one_engine_gives_under_the_weights_that_were_loaded_last(
    single, replicas, requests, assets, tmp_path
):
    assert_same(generate(replicas, requests), generate(single, requests))
    perturbed = write_perturbed(assets.model, tmp_path / "perturbed")
    for engine in (single, replicas):
        engine.call("rollout_calls:load", no_progress, perturbed, "perturbed")
    assert replicas.call("rollout_calls:held", no_progress) == single.call("rollout_calls:held", no_progress)
    assert_same(generate(replicas, requests), generate(single, requests))


def test_the_share_of_a_replica_that_dies_goes_to_another_and_the_next_load_replaces_it(
    single, replicas, requests, assets
):
    for engine in (single, replicas):
        engine.call("rollout_calls:load", no_progress, assets.model, "again")
    expected, before = generate(single, requests), replicas.call("rollout_calls:replicas", no_progress)
    assert_same(generate(replicas, requests, "generate_while_one_dies"), expected)
    assert replicas.call("rollout_calls:replicas", no_progress) == before[1:]
    for engine in (single, replicas):
        engine.call("rollout_calls:load", no_progress, assets.model, "once more")
    assert len(replicas.call("rollout_calls:replicas", no_progress)) == 2
    assert_same(generate(replicas, requests), expected)


def test_a_prompt_that_is_refused_is_named_by_its_place_in_the_batch(single, replicas, requests):
    long = Request([{"role": "user", "content": "1" * 100}], 0)
    for engine in (single, replicas):
        with pytest.raises(ConfigError, match="prompt 17 of the batch has 100 tokens"):
            generate(engine, [*requests, long])


def test_more_replicas_than_shares_are_refused():
    with pytest.raises(ConfigError, match=r"3 engines have 2 share\(s\) .* 256 sequences .* rollout.share to 85"):
        load_config(None, {"resources.rollout_replicas": 3, "rollout.share": 128})
    load_config(None, {"resources.rollout_replicas": 2, "rollout.share": 128})
