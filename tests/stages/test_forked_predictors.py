"""What a fork takes along of its source's predictors."""

import pytest
import torch
from predictor_samples import make_run, train, train_and_fit

from moe_replay.config import RunConfig
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.forking import fork_point
from moe_replay.reports.predictor_report import report_of
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.stages.predictor import refit
from moe_replay.stages.run import Run

# Predictors


def forked(source: Run, iteration: int, run_id: str, **overrides) -> Run:
    """A fork with no model behind it."""
    made = make_run(source.home.parent, run_id, **overrides)
    point = fork_point(source.store(), source.root, iteration, made.config)
    document = made.store().read_run()
    made.store().rewrite_run({**document, "forked_from": point.model_dump(mode="json")})
    return made.model_copy(update={"forked_from": point})


def weights(run: Run, ref) -> dict[int, torch.Tensor]:
    return EvolutionPredictor.from_bytes(run.open(ref).read_bytes("predictor.safetensors"), "").weights


def same(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)


@pytest.mark.parametrize("window", [1, 3])
def test_predictors_of_a_fork_and_of_a_fork_of_it_are_fitted_as_the_sources(tmp_path, window):
    source = make_run(tmp_path, predictor__window=window)
    expected = train_and_fit(source, 5)
    branch = forked(source, 2, "branch", predictor__window=window)
    found = train_and_fit(branch, 4)
    twig = forked(branch, 4, "twig", predictor__window=window)
    found += train_and_fit(twig, 5)
    for iteration, ref in enumerate(found, start=2):
        run = twig if iteration == 4 else branch
        assert same(weights(run, ref), weights(source, expected[iteration]))
        ours, theirs = report_of(run.open(ref)), report_of(source.open(expected[iteration]))
        assert (ours.layers, ours.fitted_iterations) == (theirs.layers, theirs.fitted_iterations)
    # And again from storage, with the evidence of the source.
    again = refit(twig.store(), twig.config.predictor, 4, use_stored=True)
    assert same(again.predictors.used.weights, weights(source, expected[4]))


def test_the_predictor_of_the_source_serves_the_forks_first_iteration_and_no_other(tmp_path):
    source = make_run(tmp_path)
    expected = train_and_fit(source, 2)
    branch = forked(source, 2, "branch")
    predictor = branch.forked_from.predictor
    with branch.predictor(predictor, 2) as file:
        assert file.read_bytes() == source.open(expected[1]).read_bytes("predictor.safetensors")
    with pytest.raises(RoutingMismatch, match="served by the predictor that iteration 2"):
        branch.predictor(predictor, 3).__enter__()


def test_a_fork_that_begins_to_predict_has_been_served_nothing(tmp_path):
    source = make_run(tmp_path, method="r3")
    for iteration in range(2):
        train(source, iteration)
    branch = forked(source, 2, "branch")
    assert (branch.forked_from.predictor, branch.forked_from.trainings) == (None, ())
    first, second = train_and_fit(branch, 4)
    layer = report_of(branch.open(first)).layers[0]
    assert [one.kl_change for one in layer.served.factors] == [0.0]
    assert report_of(branch.open(second)).fitted_iterations == (3,)
    assert same(
        refit(branch.store(), branch.config.predictor, 3, use_stored=False).predictors.used.weights,
        weights(branch, second),
    )


def test_a_fork_that_ceases_to_predict_takes_no_predictor_along(tmp_path):
    source = make_run(tmp_path)
    train_and_fit(source, 2)
    branch = forked(source, 2, "branch", method="r3")
    assert (branch.forked_from.predictor, branch.forked_from.trainings) == (None, ())


def test_a_predictor_that_is_still_to_be_fitted_is_waited_for(tmp_path):
    source = make_run(tmp_path)
    train_and_fit(source, 1)
    train(source, 1)
    with pytest.raises(ConfigError, match="not fitted its predictor yet; resume it first"):
        fork_point(source.store(), source.root, 2, source.config)
    assert fork_point(source.store(), source.root, 2, RunConfig(method="r3")).predictor is None
