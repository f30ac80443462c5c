"""Runs grouped, and the table that compares their methods."""

import numpy as np
import pytest
from run_samples import CONFIG, DIGEST, add_iteration, in_memory, make_run, sha256, statistics

from moe_replay.errors import ConfigError
from moe_replay.reports.comparison import MethodComparison, compare_methods
from moe_replay.reports.groups import group_runs
from moe_replay.reports.measures import training_seconds
from moe_replay.reports.papers import papers_beside
from moe_replay.reports.runs import read_results
from moe_replay.reports.summary import summary_of
from moe_replay.routing.statistics import ROUTING_FILE

ITERATIONS = 7


@pytest.fixture(scope="module")
def runs():
    """Two methods from two seeds, of which the second has a tenth of the first's mismatch."""
    root = in_memory()
    return [
        read_results(make_run(root, f"{method}-{seed}", method, seed, ITERATIONS, scale=scale))
        for seed in (0, 1)
        for method, scale in (("grpo", 1.0), ("pr2", 0.1))
    ]


def rows_of(comparison):
    (group,) = comparison.groups
    return {row.measure: row for row in group.rows}


def kl_of(run):
    return [part.metrics["mismatch/kl_k3"] for part in run.iterations]


def test_numbers_are_those_of_all_seeds_and_iterations_together(runs):
    rows = rows_of(compare_methods(group_runs(runs)))
    kl = {label: np.array([kl_of(run) for run in runs if run.method == label]) for label in ("grpo", "pr2")}
    for title, statistic in {
        "mismatch KL(k3)": np.mean,
        "mismatch KL(k3), median": np.median,
        "mismatch KL(k3), p90": lambda values: np.quantile(values, 0.9),
    }.items():
        grpo, pr2 = rows[title].cells
        assert grpo.number.value == pytest.approx(statistic(kl["grpo"]))
        assert pr2.difference.value == pytest.approx(statistic(kl["pr2"]) - statistic(kl["grpo"]))
        assert (pr2.number.seeds, pr2.number.iterations) == (2, ITERATIONS)
    extreme = rows["iterations with an extreme token"].cells[0]
    assert extreme.number.value == np.mean(kl["grpo"] > 1e-3)
    agreement = rows["agreement at mini-step 2 of 2"].cells[1]
    assert agreement.number.value == pytest.approx(0.99 - 0.01 * 0.1 * 2)


def test_windows_are_the_last_third_and_the_last(runs):
    rows = rows_of(compare_methods(group_runs(runs)))
    rewards = [[part.metrics["reward/mean"] for part in run.iterations] for run in runs if run.method == "grpo"]
    assert rows["reward, last third"].cells[0].number.value == pytest.approx(np.mean([row[-3:] for row in rewards]))
    scores = [run.iterations[-1].metrics["eval/addition/avg_at_n"] for run in runs if run.method == "grpo"]
    last = rows["avg@n of addition, last"].cells[0]
    assert last.number.value == pytest.approx(np.mean(scores))
    assert last.number.interval is None


def test_what_was_planted_is_told_and_the_rest_is_within_noise(runs):
    rows = rows_of(compare_methods(group_runs(runs)))
    verdicts = {name: row.cells[1].verdict for name, row in rows.items()}
    assert verdicts["mismatch KL(k3)"] == "lower"
    assert verdicts["agreement at mini-step 2 of 2"] == "higher"
    assert verdicts["reward, last third"] == "within noise"
    assert verdicts["avg@n of addition, last"] == "too few values"
    assert all(row.cells[0].verdict is None for row in rows.values())


def test_a_predictors_gain_is_judged_against_zero(runs):
    rows = rows_of(compare_methods(group_runs(runs)))
    grpo, pr2 = rows["predictor: agreement gained"].cells
    assert grpo.number is None
    assert pr2.number.value == pytest.approx(0.001)
    assert rows["predictor: KL saved"].cells[1].number.value == pytest.approx(0.2)
    assert pr2.verdict == "higher"


def test_any_method_can_be_the_baseline_and_no_other(runs):
    comparison = compare_methods(group_runs(runs), "pr2")
    assert rows_of(comparison)["mismatch KL(k3)"].cells[0].verdict == "higher"
    with pytest.raises(ConfigError, match="the methods there are grpo, pr2"):
        compare_methods(group_runs(runs), "r2")


def test_without_grpo_the_first_method_is_the_baseline(runs):
    other = read_results(make_run(in_memory(), "x", "r3"))
    comparison = compare_methods(group_runs([other, *(run for run in runs if run.method == "pr2")]))
    assert comparison.groups[0].baseline == "r3"


def test_methods_that_share_no_seed_are_shown_and_not_compared():
    runs = [read_results(make_run(in_memory(), f"r-{seed}", method, seed)) for method, seed in (("grpo", 0), ("r3", 1))]
    cell = rows_of(compare_methods(group_runs(runs)))["mismatch KL(k3)"].cells[1]
    assert cell.number is not None
    assert cell.difference is None
    assert cell.verdict is None


def test_the_document_survives_json(runs):
    comparison = compare_methods(group_runs(runs))
    assert MethodComparison.model_validate_json(comparison.model_dump_json()) == comparison


def test_the_summary_names_what_differs_and_what_does_not(runs):
    ((heading, sentences),) = summary_of(compare_methods(group_runs(runs)))
    assert heading == "κ = 2: 2 seeds a method, 7 iterations each"
    assert any(line.startswith("Mismatch KL(k3), against grpo: lower: pr2 (-") for line in sentences)
    assert "Reward, last third, against grpo: within noise: pr2." in sentences


def test_papers_stand_beside_what_the_runs_show_and_dashes_beside_the_rest(runs):
    rows = {row.what: row.ours for row in papers_beside(group_runs(runs))}
    assert rows["(token, layer) routed differently"] == ("10.00 %",)
    assert rows["all experts unchanged: GRPO, PR2"] == ("97.90 %, 99.79 %",)
    assert rows["KL(k3), R3 over no replay"] == ("-",)
    assert "pr2 5" in rows["benchmarks at κ = 2"][0]


def test_each_kappa_is_a_group_of_its_own(runs):
    other = read_results(make_run(in_memory(), "k4", "grpo", kappa=4))
    assert [(group.mini_steps, len(group.runs)) for group in group_runs([other, *runs])] == [(2, 4), (4, 1)]


def test_a_batch_that_the_stability_alarm_left_out_is_compared_by_what_it_has_and_told():
    steady, alarmed = (make_run(in_memory(), method, method, iterations=3) for method in ("grpo", "r3"))
    skipped = alarmed.begin("training", 3, {}, DIGEST)
    skipped.write_bytes(ROUTING_FILE, statistics(np.random.default_rng(0), 0, 1.0).model_dump_json().encode())
    skipped.commit({"mismatch/kl_k3": 0.5, "alarm/raised": 1.0}, {"method": "r3", "alarm_decisions": ["skip"]})
    add_iteration(steady, 3, np.random.default_rng(3), 2, 1.0, "grpo")
    (group,) = group_runs([read_results(steady), read_results(alarmed)])
    assert group.notes == (
        "Run r3: the stability alarm was raised in iteration 3, whose batches were trained on, or not, as was decided.",
    )
    (compared,) = compare_methods([group]).groups
    cells = {row.measure: row.cells[1].number for row in compared.rows}
    assert cells["mismatch KL(k3)"].value > 0.1
    assert cells["agreement at mini-step 1 of 2"] is not None


def test_only_iterations_that_all_completed_are_compared_and_the_rest_is_told():
    long = make_run(in_memory(), "long", "grpo", iterations=4)
    short = make_run(in_memory(), "short", "r3", iterations=2)
    short.begin("rollout", 2, {}, DIGEST).commit()
    (group,) = group_runs([read_results(long), read_results(short)])
    assert group.iterations == (0, 1)
    assert {len(run.iterations) for run in group.runs} == {2}
    assert group.notes == (
        "Run long: iterations 2 to 3 left out, which not all runs completed.",
        "Run short: iteration 2 left out, not completed.",
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_sha256": sha256("other")}, "model differ"),
        ({"train_sha256": sha256("other")}, "data.train differ"),
        ({"benchmarks_sha256": {"other": sha256("addition")}}, "benchmark addition, benchmark other differ"),
        ({"config": {"rollout": {"prompts": 16}}}, r"rollout.prompts \(8 and 16\)"),
        ({"config": {"evaluation": {"benchmarks": {}, "every": 2}}}, "evaluation.every"),
    ],
)
def test_runs_that_differ_in_what_is_not_compared_are_refused(changes, told):
    one = make_run(in_memory(), "one", iterations=1)
    other = make_run(in_memory(), "other", "r3", iterations=1, **changes)
    with pytest.raises(ConfigError, match=told):
        group_runs([read_results(one), read_results(other)])


def test_where_runs_lie_and_how_long_they_were_to_be_is_no_difference():
    moved = {"iterations": 9, "data": {"train": "/elsewhere"}, "tracking": {"experiment": "x"}}
    one, other = make_run(in_memory(), "one"), make_run(in_memory(), "other", "r3", config=moved)
    assert len(group_runs([read_results(one), read_results(other)])) == 1


def test_predictors_fitted_otherwise_are_variants_of_their_method():
    other = {"predictor": {"objective": "delta_kl"}}
    runs = [
        make_run(in_memory(), "a", "pr2"),
        make_run(in_memory(), "b", "pr2", config=other),
        make_run(in_memory(), "c", "r3", config=other),
        make_run(in_memory(), "d", "r2", config={"rollout": CONFIG["rollout"] | {"gate_dtype": "float32"}}),
    ]
    (group,) = group_runs([read_results(run) for run in runs])
    assert group.labels == ["pr2", "pr2 predictor.objective=delta_kl", "r3", "r2 rollout.gate_dtype=float32"]


def test_two_runs_of_one_method_and_seed_are_refused():
    runs = [read_results(make_run(in_memory(), name)) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="a and b are both grpo with seed 0 at κ = 2"):
        group_runs(runs)


def test_time_is_unknown_until_every_stage_has_one():
    times = {"time/rollout": 1.0, "time/routes": 0.5, "time/training": 2.0}
    assert training_seconds(times) == 3.5
    assert training_seconds(times | {"time/predictor": 0.25, "time/evaluation": 9.0}) == 3.75
    assert training_seconds({"time/rollout": 1.0}) is None


def test_the_time_of_iterations_whose_stages_overlap_is_left_out_and_that_is_said(runs):
    time = "time of an iteration, evaluation aside, median"
    assert rows_of(compare_methods(group_runs(runs)))[time].unit == "seconds"
    root = in_memory()
    ahead = {"rollout": CONFIG["rollout"] | {"one_step_off": True}}
    aside = [read_results(make_run(root, f"{method}-aside", method, config=ahead)) for method in ("grpo", "r3")]
    found = compare_methods(group_runs(aside))
    assert time not in rows_of(found)
    assert [note for note in found.groups[0].notes if "one_step_off" in note and "its time is left out" in note]
    assert not [note for note in compare_methods(group_runs(runs)).groups[0].notes if "one_step_off" in note]


def test_runs_on_other_hardware_are_compared_and_runs_scored_by_other_counts_of_samples_are_not(runs):
    root = in_memory()
    on_two_ranks = make_run(root, "r3-ranks", "r3", 0, config={"resources": {"training_world_size": 2}})
    assert len(rows_of(compare_methods(group_runs([*runs, read_results(on_two_ranks)]))))
    scored = [
        read_results(make_run(root, f"r3-{n}", "r3", 0, config={"evaluation": CONFIG["evaluation"] | samples}))
        for n, samples in enumerate(({"samples": 4, "samples_of": {}}, {"samples": 4, "samples_of": {"addition": 32}}))
    ]
    with pytest.raises(ConfigError, match=r"evaluation\.samples_of\.addition \(4 and 32\) differ"):
        group_runs(scored)
