"""What an evaluation is of and under which settings. No engine is started."""

from pathlib import Path

import pytest
from predictor_samples import make_run, train

from moe_replay.archive.artifacts import RunStore
from moe_replay.config_reading import parse_as
from moe_replay.engines.process import no_progress
from moe_replay.errors import ConfigError
from moe_replay.evaluations import EvaluationRequest, default_id, find_checkpoint, prepare_evaluation, settings_of
from moe_replay.plan import stored_config
from moe_replay.stages.run import Run
from moe_replay.tiny import EmbeddedAssets


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two iterations, of settings that are not the defaults."""
    run = make_run(tmp_path, evaluation__samples=2, evaluation__temperature=0.5, rollout__max_response_tokens=6)
    for iteration in (0, 1):
        train(run, iteration)
    return run


def request(**given) -> EvaluationRequest:
    return parse_as(EvaluationRequest, given)


def test_the_newest_checkpoint_is_named_by_its_url_unless_an_older_one_is_asked_for(run: Run) -> None:
    store = run.store()
    for asked, expected in ((None, 1), (0, 0)):
        iteration, ref = find_checkpoint(store, asked)
        committed = store.commit_of("training", expected)
        assert committed is not None
        assert (iteration, ref.sha256) == (expected, committed.sha256)
        assert ref.uri == f"{store.name}/iterations/{expected:05d}/training"
        assert store.open(ref).commit.iteration == expected


@pytest.mark.parametrize("asked", [2, 7])
def test_a_checkpoint_that_is_not_there_is_refused(run: Run, asked: int) -> None:
    with pytest.raises(ConfigError, match=f"no checkpoint of iteration {asked}; see .*status run-1"):
        find_checkpoint(run.store(), asked)


def test_a_run_that_trained_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_checkpoint(make_run(tmp_path).store(), None)


def test_the_runs_settings_hold_where_none_are_given(run: Run) -> None:
    settings = settings_of(request(run_id="run-1", evaluation={"samples": 32}), run.store())
    assert (settings.evaluation.samples, settings.evaluation.temperature) == (32, 0.5)
    assert settings.rollout.max_response_tokens == 6
    longer = settings_of(request(run_id="run-1", rollout={"max_response_tokens": 12}, seed=3), run.store())
    assert (longer.rollout.max_response_tokens, longer.seed, longer.evaluation.samples) == (12, 3, 2)


def test_counts_of_samples_follow_the_benchmarks_that_are_scored(run: Run) -> None:
    own = settings_of(request(run_id="run-1", evaluation={"samples_of": {"addition": 8}}), run.store())
    assert own.evaluation.samples_of == {"addition": 8}
    (name, file) = next(iter(run.config.evaluation.benchmarks.items()))
    counted = run.config.model_copy(
        update={"evaluation": run.config.evaluation.model_copy(update={"samples_of": {name: 8}})}
    )
    store = RunStore(run.root, "counted")
    store.create_run(run.store().read_run() | {"config": counted.model_dump(mode="json")})
    other = settings_of(request(run_id="counted", evaluation={"benchmarks": {"other": file}}), store)
    assert (other.evaluation.benchmarks, other.evaluation.samples_of) == ({"other": file}, {})
    with pytest.raises(ConfigError, match=r"samples_of names unknown, which is no benchmark; known are addition"):
        settings_of(request(run_id="run-1", evaluation={"samples_of": {"unknown": 8}}), run.store())


def test_an_id_tells_settings_apart_and_checkpoints_not(run: Run) -> None:
    ids = [
        default_id("run-1", settings_of(request(run_id="run-1", **given), run.store()))
        for given in ({}, {"iteration": 0}, {"evaluation": {"samples": 3}})
    ]
    assert ids[0] == ids[1] != ids[2]
    assert all(name.startswith("eval-run-1-") for name in ids)
    assert len(default_id("x" * 64, run.config)) <= 64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run_id": "a", "model": {"path": "embedded"}}, "two things to evaluate"),
        ({"iteration": 3}, "name the run by run_id"),
        ({"evaluation": {"sample": 3}}, "unknown config key 'evaluation.sample': did you mean 'samples'"),
        ({"training": {"learning_rate": 1.0}}, "unknown config key 'training'"),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_refused(given: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        request(**given)


def test_an_evaluation_without_benchmarks_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="nothing to score"):
        settings_of(request(run_id="run-1", evaluation={"benchmarks": {}}), run.store())


def test_an_evaluation_is_never_trained_and_another_subject_is_refused_its_id(
    assets: EmbeddedAssets, tmp_path: Path
) -> None:
    asked = {"storage": {"root": str(tmp_path)}}
    made = prepare_evaluation(request(**asked), "scores", no_progress)
    assert made.checkpoint == "embedded"
    assert made.policy == made.run.initial_policy
    with pytest.raises(ConfigError, match="scores is an evaluation of embedded, nothing to train"):
        stored_config(RunStore(str(tmp_path), "scores"))
    assert prepare_evaluation(request(**asked), "scores", no_progress).run == made.run
    with pytest.raises(ConfigError, match=r"exists with another configuration: config\.evaluation\.samples"):
        prepare_evaluation(request(**asked, evaluation={"samples": 9}), "scores", no_progress)


def test_a_run_started_from_another_model_is_not_evaluated_with_this_one(assets: EmbeddedAssets, run: Run) -> None:
    with pytest.raises(ConfigError, match="was started from"):
        prepare_evaluation(request(run_id="run-1", storage={"root": run.root}), None, no_progress)
