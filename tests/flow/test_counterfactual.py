"""Other methods' routes on stored tokens: real runs, and the training engine without vLLM."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compared_runs import Compared

from moe_replay.cli.counterfactual import counterfactual
from moe_replay.config import RunConfig
from moe_replay.engines.pool import EnginePool
from moe_replay.engines.process import no_progress
from moe_replay.errors import ConfigError
from moe_replay.methods import Method
from moe_replay.plan import stored_config
from moe_replay.preparation import prepare
from moe_replay.reports.counterfactuals import Counterfactual
from moe_replay.stages.replayable import tellable_methods
from moe_replay.stages.run import Run

Ask = Callable[[str, list[str]], Counterfactual]


@pytest.fixture(scope="module")
def ask(compared: Compared, home: Path) -> Iterator[Ask]:
    """Tries methods on iteration 1 of a run, judged by the very policy that sampled it; one engine for all."""
    first = reopened(compared, "r3")
    pool = EnginePool(first.model, first.model_sha256, first.config.rollout, first.config.training, home / "logs")

    def one(name: str, methods: list[str]) -> Counterfactual:
        sampled_by = compared.store(name).commit_of("training", 0)
        chosen = [Method.model_validate(method) for method in methods]
        call = "moe_replay.stages.counterfactual:replay_counterfactually"
        return pool.training().call(call, no_progress, reopened(compared, name), 1, sampled_by, chosen)

    yield one
    pool.close()


def reopened(compared: Compared, name: str) -> Run:
    """A run of the comparison as a stage sees it."""
    store = compared.store(name)
    config: RunConfig = stored_config(store)
    storage = config.storage.model_copy(update={"root": str(compared.root)})
    return prepare(config.model_copy(update={"storage": storage}), store.run_id, no_progress)


def test_the_methods_own_counterfactual_is_what_the_run_measured(compared: Compared, ask: Ask) -> None:
    found = ask("r3", ["r2", "r3"])

    trained = compared.metrics("r3", 1)
    assert found.layers_predicted is None
    assert found.methods["r3"].kl_k3 == pytest.approx(trained["mismatch/kl_k3"], abs=1e-6)
    assert found.methods["r3"].extreme_fraction == trained["mismatch/extreme_fraction"]
    assert 0 < found.methods["r3"].agreement < 1
    # Nothing moved between the policy that chose R2's routes and the one that judges them.
    assert found.methods["r2"].agreement_L == (1.0,) * len(found.layers)
    assert found.methods["r2"].forced_kl_k3 == pytest.approx(0, abs=1e-9)
    # Both gaps are above 0: the chosen K of E experts never get all of a softmax.
    assert 0 < found.methods["r2"].coverage_gap < found.methods["r3"].coverage_gap


def test_r2_takes_its_routes_from_the_policy_that_is_trained_also_where_the_rollout_was_one_step_off(
    compared: Compared, ask: Ask
) -> None:
    found = ask("one-step-off", ["r2", "r3"])

    trained = compared.metrics("one-step-off", 1)
    assert found.methods["r3"].kl_k3 == pytest.approx(trained["mismatch/kl_k3"], abs=1e-6)
    assert found.methods["r2"].agreement_L == (1.0,) * len(found.layers)


def test_on_a_rollout_that_was_predicted_its_own_routes_are_pr2s(compared: Compared, ask: Ask) -> None:
    found = ask("at-once", ["r2", "pr2"])

    trained = compared.metrics("at-once", 1)
    assert found.layers_predicted is None
    assert found.methods["pr2"].kl_k3 == pytest.approx(trained["mismatch/kl_k3"], abs=1e-6)
    # R2 would have sampled without the prediction.
    assert (found.methods["r2"].kl_k3, found.methods["r2"].extreme_fraction) == (None, None)


def test_elsewhere_the_predictor_that_the_run_fitted_steers_the_trainer(compared: Compared, ask: Ask) -> None:
    found = ask("in-the-old-pass", ["r3", "pr2"])

    assert found.layers_predicted == compared.metrics("in-the-old-pass", 0)["predictor/layers_used"]
    assert found.methods["r3"].kl_k3 is not None
    assert found.methods["pr2"].kl_k3 is None
    assert 0 < found.methods["pr2"].agreement <= 1


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("r3", {"methods": "r3,grpo"}, "grpo replays no routes"),
        ("r3", {"iteration": 7}, r"no checkpoint of iteration 7; it has those of \[0, 1\]"),
        ("r3", {"iteration": 7, "checkpoint": 1}, "no rollout of iteration 7"),
        ("r3", {"methods": "pr2", "iteration": 0}, "pr2 predicts nothing in iteration 0"),
        ("at-once", {"methods": "r3"}, "was served under a predictor; take an earlier one"),
        ("r3", {"methods": ""}, "unknown method ''"),
    ],
    ids=["no routes", "unknown iteration", "no rollout", "nothing to predict", "mislabelled", "no method"],
)
def test_what_cannot_be_told_is_refused_before_an_engine_starts(
    compared: Compared, name: str, asked: dict, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        counterfactual(compared.store(name).run_id, root=str(compared.root), **asked)


def test_by_default_only_what_can_be_told_is_asked(compared: Compared) -> None:
    assert tellable_methods(compared.store("r3"), 1) == ["r2", "r3"]
    assert tellable_methods(compared.store("at-once"), 1) == ["r2", "pr2"]
    assert tellable_methods(compared.store("in-the-old-pass"), 1) == ["r2", "r3", "pr2"]
    # The predictor of the first iteration of a run of PR2 is zero: it moves no route.
    assert "predictor" in compared.store("pr2").committed("rollout", 1).commit.inputs
    assert tellable_methods(compared.store("pr2"), 1) == ["r2", "r3", "pr2"]
