"""The rollout engine's calls by name, and what its responses are compared with."""

from pathlib import Path

import numpy as np
from models import reference, same_sets

from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.engines.rollout import Request, Response

TOLERANCE = 2e-5  # fp32, two implementations of the same sums
CLEAR_MARGIN = 1e-4  # of router logits; closer ones may fall either way
Predictor = tuple[Path, str]


def generate(engine: EngineProcess, requests: list[Request], temperature: float = 1.0) -> list[Response]:
    return engine.call("rollout_calls:generate", no_progress, requests, temperature)


def load(engine: EngineProcess, folder: Path, weights: str, predictor: Predictor | None = None) -> str | None:
    return engine.call("rollout_calls:load", no_progress, folder, weights, predictor)


def held(engine: EngineProcess) -> tuple[str | None, str | None, str | None, float | None]:
    return engine.call("rollout_calls:held", no_progress)


def assert_as_transformers(responses: list[Response], folder: Path, temperature: float = 1.0) -> None:
    compared = unclear = 0
    for response in responses:
        expected = reference(folder, response.prompt_ids, response.response_ids, temperature)
        np.testing.assert_allclose(response.log_probs, expected.log_probs_S, rtol=0, atol=TOLERANCE)
        trace = response.trace
        assert trace.num_tokens == len(response.prompt_ids) + len(response.response_ids)
        assert trace.valid_T.tolist() == [True] * (trace.num_tokens - 1) + [False]
        clear_TL = (expected.router_margin_TL > CLEAR_MARGIN)[:-1]
        assert same_sets(trace.ids_TLK, expected.ids_TLK)[:-1][clear_TL].all()
        compared, unclear = compared + clear_TL.size, unclear + (~clear_TL).sum()
    assert unclear < 0.001 * compared
