"""What people find in MLflow and Prefect after a comparison, looked at with a browser."""

import json
import re
from typing import Any
from urllib.parse import urlencode

import pytest
from asking import ask
from mlflow import MlflowClient
from page import Browser

pytestmark = pytest.mark.browser

RUNS = ("demo-grpo-s0", "demo-grpo-s1", "demo-r3-s0", "demo-r3-s1")


@pytest.fixture(scope="module")
def tracked(browser: Browser) -> dict[str, Any]:
    """The comparison's MLflow runs by name; the run that failed is `broken`."""
    client = MlflowClient(browser.shown.mlflow)
    experiment = client.get_experiment_by_name("moe-replay")
    assert experiment is not None
    browser.prefer(experiment.experiment_id)
    found = client.search_runs([experiment.experiment_id])
    return {run.info.run_name if run.info.status == "FINISHED" else "broken": run for run in found}


def experiment_page(browser: Browser, tracked: dict[str, Any]) -> str:
    return f"{browser.shown.mlflow}/#/experiments/{tracked['demo'].info.experiment_id}"


def test_runs_are_told_apart_by_columns(browser: Browser, tracked: dict[str, Any]) -> None:
    told = browser.open(f"{experiment_page(browser, tracked)}/runs", *RUNS, "method", "kappa", "seed", "mismatch/kl_k3")
    browser.screenshot("mlflow-runs")
    assert told.count("grpo\n") >= 2
    assert "train (" in told


def test_charts_draw_the_runs_of_a_comparison_by_iteration(browser: Browser, tracked: dict[str, Any]) -> None:
    wanted = urlencode({"compareRunsMode": "CHART", "searchFilter": "tags.comparison = 'demo'"})
    browser.open(f"{experiment_page(browser, tracked)}/runs?{wanted}", *RUNS, height=1100)
    browser.fill("Search metric charts", "mismatch/(kl_k3|extreme)")
    browser.wait_for("mismatch/kl_k3", "demo-r3-s1 (mismatch/kl_k3)", "Step")
    browser.screenshot("mlflow-charts")


def test_parallel_coordinates_join_method_kappa_seed_and_results(browser: Browser, tracked: dict[str, Any]) -> None:
    wanted = json.dumps([tracked[name].info.run_id for name in RUNS])
    experiments = json.dumps([tracked["demo"].info.experiment_id])
    told = browser.open(f"{browser.shown.mlflow}/#/compare-runs?runs={wanted}&experiments={experiments}", *RUNS)
    assert "Parallel Coordinates Plot" in told
    browser.click("Clear All")
    browser.choose(0, "method.name", "kappa", "seed")
    browser.choose(1, "mismatch/kl_k3")
    # Once the plot is drawn anew it has an axis with both methods. The table below it names all too, in another way.
    plot, _, _ = browser.wait_for("grpo\nr3").partition("Run details")
    browser.screenshot("mlflow-compare")
    axes = plot[plot.rindex("method.name") : plot.rindex("mismatch/kl_k3")].splitlines()
    assert axes[:4] == ["method.name", "grpo", "r3", "kappa"]
    assert "seed" in axes


def test_a_runs_page_leads_to_its_artifacts_and_to_prefect(browser: Browser, tracked: dict[str, Any]) -> None:
    run = tracked["demo-r3-s0"]
    page = f"{experiment_page(browser, tracked)}/runs/{run.info.run_id}"
    told = browser.open(page, "Description", "Datasets", "Finished", "mismatch/kl_k3", height=1000)
    browser.screenshot("mlflow-run")
    assert (browser.shown.home / "runs/demo-r3-s0").as_uri() in told
    assert "moe-replay resume demo-r3-s0" in told
    assert "flow run of the newest attempt" in told
    browser.open(f"{page}/artifacts/figures/dashboard.png", "layers.csv", "figures/dashboard.png")
    browser.screenshot("mlflow-dashboard")
    browser.open(f"{page}/system-metrics", "cpu_utilization_percentage")


def test_checkpoints_are_models_with_their_evaluation(browser: Browser, tracked: dict[str, Any]) -> None:
    page = f"{experiment_page(browser, tracked)}/models"
    told = browser.open(page, "demo-r3-s1-00005", "eval/addition/avg_at_n", "method", width=2300, height=1000)
    browser.screenshot("mlflow-models")
    assert re.search(r"Dataset: addition|addition \(#", told)


def flow_run(browser: Browser, tracked: dict[str, Any], name: str) -> str:
    return f"{browser.shown.prefect}/runs/flow-run/{tracked[name].data.tags['prefect.flow_run']}"


def test_a_flow_run_shows_its_iterations_and_their_stages(browser: Browser, tracked: dict[str, Any]) -> None:
    browser.open(flow_run(browser, tracked, "demo-r3-s1"), "train-demo-r3-s1", "Completed", height=1000)
    browser.screenshot("prefect-train")
    browser.click("Subflow Runs")
    browser.wait_for("demo-r3-s1-5")
    browser.click("demo-r3-s1-5")
    browser.wait_for("Task Runs", "Completed")
    browser.click("Task Runs")
    browser.wait_for("routes-5", "training-5", "evaluation-5")
    browser.screenshot("prefect-iteration")


def test_artifacts_hold_results_and_durations_and_lead_to_mlflow_and_storage(
    browser: Browser, tracked: dict[str, Any]
) -> None:
    run = tracked["demo-r3-s1"]
    told = browser.open(
        newest_artifact(browser, "run-demo-r3-s1"), "Seconds per stage", "evaluation", "6 of 6 iterations"
    )
    browser.screenshot("prefect-artifact")
    assert (browser.shown.home / "runs/demo-r3-s1").as_uri() in told
    assert f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in browser.target(
        "metrics, charts, checkpoints"
    )
    browser.open(newest_artifact(browser, "results-demo-r3-s1"), "mismatch/kl_k3", "reward/mean")


def newest_artifact(browser: Browser, key: str) -> str:
    """Address of an artifact's newest version."""
    (found,) = ask(f"{browser.shown.prefect}/api/artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
    return f"{browser.shown.prefect}/artifacts/artifact/{found['latest_id']}"


def test_a_failure_names_its_stage_and_reason_in_both(browser: Browser, tracked: dict[str, Any]) -> None:
    told = browser.open(flow_run(browser, tracked, "broken"), "Failed", "model.safetensors was altered", height=1150)
    browser.click("Details")
    browser.wait_for("State Message")
    browser.click("See More")
    browser.wait_for("model.safetensors was altered")
    browser.screenshot("prefect-failure")
    assert "train-demo-r3-s0" in told
    page = f"{experiment_page(browser, tracked)}/runs/{tracked['broken'].info.run_id}"
    browser.open(page, "Failed", "moe-replay resume demo-r3-s0 --root")
