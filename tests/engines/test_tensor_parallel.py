"""One vLLM engine spread over two processes, beside one in a single process: the same tokens and routes."""

from collections.abc import Iterator

import numpy as np
import pytest
from models import write_perturbed
from predictors import write_predictor
from rollout_calls import CONFIG

from moe_replay.data.prompts import PromptTable
from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.engines.rollout import Request, Response
from moe_replay.sections import ResourcesConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spread(assets, tmp_path_factory) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("logs") / "rollout.log"
    arguments = (assets.model, "embedded", CONFIG, ResourcesConfig(rollout_tensor_parallel_size=2))
    engine = EngineProcess("moe_replay.engines.replicas:make_rollout", arguments, "rollout", log, rollout.ENVIRONMENT)
    yield engine
    engine.stop()


def generate(engine: EngineProcess, requests: list[Request]) -> list[Response]:
    return engine.call("rollout_calls:generate", no_progress, requests, 1.0)


def test_an_engine_on_two_processes_gives_what_one_gives_under_swapped_weights_and_a_predictor(
    embedded, spread, assets, tmp_path
):
    prompts = PromptTable.open(assets.benchmark).take(40)
    requests = [Request(prompt.messages, seed) for seed, prompt in enumerate(prompts)]
    perturbed = write_perturbed(assets.model, tmp_path / "perturbed")
    predictor = write_predictor(tmp_path / "predictor.safetensors", 0.1)
    for change in (
        ("embedded", assets.model, None),
        ("perturbed", perturbed, None),
        ("perturbed", perturbed, predictor),
    ):
        weights, folder, merged = change
        for engine in (embedded, spread):
            engine.call("rollout_calls:load", no_progress, folder, weights, merged)
        one, two = (generate(engine, requests) for engine in (embedded, spread))
        assert [a.response_ids for a in one] == [b.response_ids for b in two]
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(b.log_probs, a.log_probs, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(np.sort(b.trace.ids_TLK), np.sort(a.trace.ids_TLK))
    assert spread.call("rollout_calls:held", no_progress) == embedded.call("rollout_calls:held", no_progress)
