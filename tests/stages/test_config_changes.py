"""Going on with a run under another config: what may change, what of the past stays of use."""

import pytest

from moe_replay.archive.artifacts import RunStore
from moe_replay.config import RunConfig
from moe_replay.config_reading import overridden
from moe_replay.data import addition
from moe_replay.engines.process import no_progress
from moe_replay.errors import ConfigError
from moe_replay.plan import RunPlan
from moe_replay.preparation import preflight, prepare
from moe_replay.stages.run import Run


def commit_iteration(run: Run, iteration: int, *stages: str) -> None:
    """Commit these stages of an iteration, by default all that it has."""
    for stage in stages or run.plan.stages(iteration):
        writer = run.store().begin(stage, iteration, {"policy": run.initial_policy}, run.digest(stage))
        writer.write_bytes("part", f"{stage} {iteration}".encode())
        writer.commit()


def go_on(config: RunConfig, *allowed: str, **overrides) -> Run:
    """Prepare run-1 with dotted keys, written with two underscores, set."""
    wanted = overridden(config, {key.replace("__", "."): value for key, value in overrides.items()})
    return prepare(wanted, "run-1", no_progress, allowed)


def test_more_iterations_are_refused_until_they_are_allowed(config):
    go_on(config)
    with pytest.raises(ConfigError, match=r"iterations \(5 -> 8\).*give --allow-config-change"):
        go_on(config, iterations=8)
    run = go_on(config, "iterations", iterations=8)
    assert list(run.plan.iterations) == list(range(8))
    # As a retry of the first flow run would.
    with pytest.raises(ConfigError, match=r"\(8 -> 5\); .*moe-replay resume run-1, or a new run of the deployment"):
        go_on(config)
    assert RunPlan.stored(run.store()) == run.plan.model_copy(
        update={"config": overridden(run.config, {"storage.root": None})}
    )


def test_every_key_that_differs_is_told_with_both_values_and_what_to_do(config):
    go_on(config)
    with pytest.raises(ConfigError) as caught:
        go_on(config, "iterations", iterations=8, training__learning_rate=1e-5, evaluation__samples=1, method="grpo")
    told = str(caught.value)
    assert "iterations (" not in told
    for difference in (
        "evaluation.samples (4 -> 1)",
        "method.name ('r3' -> 'grpo')",
        "method.route_source ('rollout' -> 'none')",
        "training.learning_rate (0.0001 -> 1e-05)",
    ):
        assert difference in told
    assert "to change evaluation.samples, give --allow-config-change" in told
    assert "method.name, method.route_source, training.learning_rate can't change" in told
    assert "moe-replay fork run-1 --iteration N" in told


@pytest.mark.parametrize("key", ["training", "training.learning_rate", "evaluation.sample", "iteration"])
def test_only_what_nothing_is_trained_from_may_be_allowed(config, key):
    with pytest.raises(ConfigError, match=rf"'{key}' can't be allowed to change.*function of one config"):
        preflight(config, "run-1", [key])


def test_a_run_goes_on_with_other_hardware_unasked(config):
    run = go_on(config)
    commit_iteration(run, 0)
    again = go_on(config, resources__training_world_size=2)
    assert again.config.resources.training_world_size == 2
    assert again.find("training", 0, {"policy": run.initial_policy}) is not None


def test_a_run_that_was_complete_goes_on(config):
    run = go_on(config)
    for iteration in range(5):
        commit_iteration(run, iteration)
    assert run.is_complete()
    run = go_on(config, "iterations", iterations=8)
    assert not run.is_complete()
    for iteration in range(5):
        assert run.find("evaluation", iteration, {"policy": run.initial_policy}) is not None


def test_evaluations_made_before_a_change_stay_and_new_ones_are_made_as_asked(config, tmp_path):
    run = go_on(config, iterations=6, evaluation__every=2)
    for iteration in range(3):
        commit_iteration(run, iteration)
    run = go_on(
        config,
        "evaluation",
        iterations=6,
        evaluation__samples=2,
        evaluation__benchmarks={"b": str(tmp_path / "test.parquet")},
    )
    assert [run.plan.evaluates(n) for n in range(6)] == [False, True, False, True, True, True]
    assert run.find("evaluation", 1, {"policy": run.initial_policy}) is not None
    commit_iteration(run, 3)
    assert run.find("evaluation", 3, {"policy": run.initial_policy}) is not None
    digests = {n: run.store().committed("evaluation", n).commit.config_digest for n in (1, 3)}
    assert digests[1] != digests[3]
    # Changed once more, both are still of use.
    again = go_on(
        config,
        "evaluation.samples",
        iterations=6,
        evaluation__samples=3,
        evaluation__benchmarks=run.config.evaluation.benchmarks,
    )
    assert all(again.find("evaluation", n, {"policy": run.initial_policy}) for n in (1, 3))
    assert [before.until for before in again.earlier] == [3, 4]


def test_no_other_stage_is_found_under_an_earlier_config(config):
    run = go_on(config)
    commit_iteration(run, 0)
    store = RunStore(run.root, "run-1")
    with pytest.raises(ConfigError, match="config digest"):
        store.find("evaluation", 0, {"policy": run.initial_policy}, "other")
    assert run.digest("training") == go_on(config, "evaluation", evaluation__samples=9).digest("training")


def test_what_was_changed_is_written_down_with_when_and_what_there_was_before(config):
    go_on(config)
    go_on(config, "iterations", "evaluation.samples", iterations=7, evaluation__samples=1)
    run = go_on(config, "iterations", iterations=9, evaluation__samples=1)
    document = run.store().read_run()
    first, second = document["about"]["config_changes"]
    assert (first["keys"], first["before"]["iterations"], first["since"]) == (
        ["evaluation.samples", "iterations"],
        5,
        0,
    )
    assert first["before"]["evaluation"]["samples"] == 4
    assert (second["keys"], second["before"]) == (["iterations"], {"iterations": 7})
    assert first["on"][:2] == "20"
    assert (document["config"]["iterations"], document["config"]["evaluation"]["samples"]) == (9, 1)
    assert document["about"]["created_as"]


def test_an_allowed_key_that_does_not_differ_changes_nothing(config):
    run = go_on(config)
    before = run.store().read_run()
    assert go_on(config, "iterations", "evaluation") == run
    assert run.store().read_run() == before


def test_a_benchmark_whose_file_changed_is_accepted_where_evaluation_may_change(config, tmp_path):
    run = go_on(config)
    commit_iteration(run, 0)
    addition.write_parquet(tmp_path / "test.parquet", addition.split_problems(16, 4, seed=1).rest[:5], "test")
    with pytest.raises(ConfigError, match=r"benchmarks_sha256\.addition"):
        go_on(config)
    with pytest.raises(ConfigError, match=r"benchmarks_sha256\.addition"):
        go_on(config, "evaluation.samples", evaluation__samples=1)
    changed = go_on(config, "evaluation.benchmarks")
    assert changed.benchmarks["addition"].sha256 != run.benchmarks["addition"].sha256
    assert changed.find("evaluation", 0, {"policy": run.initial_policy}) is not None
    [change] = run.store().read_run()["about"]["config_changes"]
    assert change["benchmarks_sha256"] == {"addition": run.benchmarks["addition"].sha256}
    assert go_on(config).benchmarks == changed.benchmarks


def test_what_was_begun_is_not_cut_off(config):
    run = go_on(config)
    commit_iteration(run, 0)
    commit_iteration(run, 1)
    commit_iteration(run, 2, "rollout")
    with pytest.raises(ConfigError, match=r"iterations = 2, but run run-1 has begun 3.*give at least 3"):
        go_on(config, "iterations", iterations=2)
    assert not go_on(config, "iterations", iterations=3).is_complete()


def test_what_becomes_the_last_iteration_is_evaluated(config):
    run = go_on(config, evaluation__every=3)
    commit_iteration(run, 0)
    commit_iteration(run, 1)
    run = go_on(config, "iterations", iterations=2, evaluation__every=3)
    assert [run.plan.evaluates(n) for n in range(2)] == [False, True]
    assert not run.is_complete()
    commit_iteration(run, 1, "evaluation")
    assert run.is_complete()


def test_where_a_later_change_began_earlier_it_holds_from_there():
    """As after stages were superseded and made again."""
    store = RunStore("memory://eras", "run-1")
    config = RunConfig(iterations=9).model_dump(mode="json")
    changes = [
        {"on": "2025-11-22T12:00:00Z", "since": since, "keys": ["evaluation.every"], "benchmarks_sha256": {}}
        | {"before": {"evaluation": {**config["evaluation"], "every": every}}}
        for since, every in ((5, 3), (2, 4))
    ]
    store.create_run({"config": config}, about={"config_changes": changes})
    plan = RunPlan.stored(store)
    assert [(before.config.evaluation.every, before.until) for before in plan.earlier] == [(3, 2), (4, 2)]
    assert [plan.evaluates(n) for n in range(4)] == [False, False, True, True]


def test_a_change_holds_from_the_iteration_at_work_though_the_next_was_sampled_already(config):
    run = go_on(config)
    commit_iteration(run, 0)
    commit_iteration(run, 1, "rollout", "routes")
    commit_iteration(run, 2, "rollout")
    changed = go_on(config, "evaluation", evaluation__samples=1)
    assert [before.until for before in changed.plan.earlier] == [1]


def test_a_run_may_end_before_the_iteration_that_was_only_sampled(config):
    run = go_on(config)
    commit_iteration(run, 0)
    commit_iteration(run, 1, "rollout", "routes")
    commit_iteration(run, 2, "rollout")
    with pytest.raises(ConfigError, match="has begun 2"):
        go_on(config, "iterations", iterations=1)
    assert go_on(config, "iterations", iterations=2).config.iterations == 2
