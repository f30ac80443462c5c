"""vLLM replicas under Ray, beside one engine that samples the same shares."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from models import assert_same, write_perturbed
from rollout_calls import CONFIG, LONGEST_PROMPT

from moe_replay.config_reading import load_config
from moe_replay.data.prompts import PromptTable
from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.engines.ray_cluster import device_for
from moe_replay.engines.rollout import Request, Response, shares_of
from moe_replay.errors import ConfigError
from moe_replay.sections import ResourcesConfig

SHARE = 5
REQUESTS = 17


@pytest.fixture(scope="module")
def requests(assets) -> list[Request]:
    prompts = PromptTable.open(assets.benchmark).take(REQUESTS)
    return [Request(prompt.messages, seed) for seed, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def replicas(assets, tmp_path_factory) -> Iterator[EngineProcess]:
    """Two; when they are stopped, no process of theirs or of Ray's stays."""
    config = CONFIG.model_copy(update={"share": SHARE})
    arguments = (assets.model, "embedded", config, ResourcesConfig(rollout_replicas=2))
    log = tmp_path_factory.mktemp("logs") / "rollout.log"
    engine = EngineProcess("moe_replay.engines.replicas:make_rollout", arguments, "rollout", log, rollout.ENVIRONMENT)
    yield engine
    family = psutil.Process(engine.pid).children(recursive=True)
    assert len(family) > 2
    engine.stop()
    assert psutil.wait_procs(family, timeout=20)[1] == []


def generate(engine: EngineProcess, requests: list[Request], function: str = "generate") -> list[Response]:
    return engine.call(f"rollout_calls:{function}", no_progress, requests, 1.0)


def share_by_share(engine: EngineProcess, requests: list[Request]) -> list[Response]:
    """What one engine makes of the shares."""
    parts = (generate(engine, requests[share]) for share in shares_of(len(requests), SHARE))
    return [response for part in parts for response in part]


def load(engines: tuple[EngineProcess, ...], folder: Path, weights: str) -> None:
    for engine in engines:
        engine.call("rollout_calls:load", no_progress, folder, weights)


def test_replicas_give_what_one_engine_gives_under_the_weights_that_were_loaded_last(
    embedded, replicas, requests, assets, tmp_path
):
    assert_same(generate(replicas, requests), share_by_share(embedded, requests))
    load((embedded, replicas), write_perturbed(assets.model, tmp_path / "perturbed"), "perturbed")
    assert replicas.call("rollout_calls:held", no_progress) == embedded.call("rollout_calls:held", no_progress)
    assert_same(generate(replicas, requests), share_by_share(embedded, requests))


def test_responses_go_on_in_replicas_as_they_do_in_one_engine(embedded, replicas, requests, assets):
    load((replicas,), assets.model, "embedded")
    cut = [replace(request, max_new_tokens=2) for request in requests]
    first = generate(replicas, cut)
    assert_same(first, share_by_share(embedded, cut))
    going = zip(requests, first, strict=True)
    on = [replace(one, seed=99 + one.seed, begun=tuple(sofar.response_ids)) for one, sofar in going if sofar.truncated]
    assert len(on) > SHARE
    second = generate(replicas, on)
    assert_same(second, share_by_share(embedded, on))
    assert [one.trace.num_tokens for one in second] == [1 + len(one.response_ids) for one in second]


def test_the_share_of_a_replica_that_dies_goes_to_another_and_the_next_load_replaces_it(
    embedded, replicas, requests, assets
):
    load((replicas,), assets.model, "again")
    expected, before = share_by_share(embedded, requests), replicas.call("rollout_calls:replicas", no_progress)
    assert_same(generate(replicas, requests, "generate_while_one_dies"), expected)
    assert replicas.call("rollout_calls:replicas", no_progress) == before[1:]
    load((replicas,), assets.model, "once more")
    assert len(replicas.call("rollout_calls:replicas", no_progress)) == 2
    assert_same(generate(replicas, requests), expected)


def test_a_replica_that_died_idle_is_replaced_with_the_next_load(embedded, replicas, requests, assets):
    load((replicas,), assets.model, "before the death")
    expected, before = share_by_share(embedded, requests), replicas.call("rollout_calls:replicas", no_progress)
    assert replicas.call("rollout_calls:rest_after_one_died", no_progress) == before[1:]
    load((replicas,), assets.model, "after the death")
    assert len(replicas.call("rollout_calls:replicas", no_progress)) == 2
    assert_same(generate(replicas, requests), expected)


def test_gpus_are_taken_in_turns_on_this_machine_alone():
    many = {"GPU": 8.0, "CPU": 64.0}
    assert device_for(many, 8, "resources.training_world_size", None, colocated=True) == "GPU"
    assert device_for({"CPU": 64.0}, 8, "resources.training_world_size", "head:6379", colocated=True) == "CPU"
    with pytest.raises(ConfigError, match=r"resources\.colocated .* head:6379 gives each of them GPUs of its own"):
        device_for(many, 8, "resources.training_world_size", "head:6379", colocated=True)
    with pytest.raises(ConfigError, match=r"rollout_replicas = 9 takes a GPU for each, and this machine has 8"):
        device_for(many, 9, "resources.rollout_replicas", None, colocated=False)


def test_a_prompt_that_is_refused_is_named_by_its_place_in_the_batch(replicas, requests):
    long = Request([{"role": "user", "content": "1" * (LONGEST_PROMPT + 1)}], 0)
    with pytest.raises(ConfigError, match="prompt 17 of the batch has 301 tokens"):
        generate(replicas, [*requests, long])


def test_more_replicas_than_shares_are_refused():
    with pytest.raises(ConfigError, match=r"3 engines have 2 share\(s\) .* 256 sequences .* rollout.share to 85"):
        load_config(None, {"resources.rollout_replicas": 3, "rollout.share": 128})
    load_config(None, {"resources.rollout_replicas": 2, "rollout.share": 128})
