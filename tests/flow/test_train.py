"""The whole chain on the embedded model: real vLLM, verl, Prefect server and MLflow database."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from asking import mlflow, tasks_of
from command import EXACT, SMALL, run_json, start
from compared_runs import Compared
from kills import PATIENT, KilledRun
from machine import Machine
from mlflow import MlflowClient
from variants import VARIANTS

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.methods import PRESETS
from moe_replay.reports.measures import is_served
from tasks.dashboard import DASHBOARD, LAYER_TABLE, LAYERS

STAGES = {"rollout", "routes", "training", "evaluation"}
ALL_STAGES = STAGES | {"predictor"}


@pytest.mark.parametrize("method", [*PRESETS, *VARIANTS])
def test_each_method_trains_two_iterations(method: str, compared: Compared) -> None:
    for iteration in (0, 1):
        metrics = compared.metrics(method, iteration)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["policy/grad_norm"] > 0
        assert metrics["mismatch/kl_k3"] >= 0
        assert 0 <= metrics["routing/coverage_gap"] <= 1
        assert 0 <= metrics["eval/addition/avg_at_n"] <= 1
        # 1 in 13 rows has no route: the last token of each sequence was never fed.
        assert 0 < metrics["routing/missing_fraction"] < 0.1
    store = compared.store(method)
    found = [store.commit_of(stage, n) for stage in ALL_STAGES for n in (0, 1)]
    assert [problem for ref in found if ref for problem in store.verify(ref)] == []


def test_a_benchmark_is_answered_as_often_as_asked_for(compared: Compared) -> None:
    for name, samples in (("pr2", 1), ("at-once", 3)):
        scores = compared.store(name).committed("evaluation", 0)
        assert scores is not None
        rows = pq.read_table(io.BytesIO(scores.read_bytes("scores.parquet"))).to_pylist()
        answered = Counter(row["problem"] for row in rows)
        assert len(answered) > 1
        assert set(answered.values()) == {samples}


def test_methods_differ_where_they_should_and_nowhere_else(compared: Compared) -> None:
    first = {method: compared.metrics(method, 0) for method in PRESETS}
    rolled_out, trained = set(), {}
    for method in PRESETS:
        rollout, training = (compared.store(method).committed(stage, 0) for stage in ("rollout", "training"))
        assert rollout is not None
        assert training is not None
        rolled_out.add(rollout.commit.objects)
        weights = (one for one in training.commit.objects if one.path.endswith("model.safetensors"))
        trained.setdefault(next(weights).sha256, []).append(method)
    # The first rollout is the same: same weights, prompts and seeds.
    assert len(rolled_out) == 1
    # Without a predictor yet, PR2 is R3 bit for bit.
    alone = [[method] for method in PRESETS if method not in ("r3", "pr2")]
    assert sorted(trained.values()) == sorted([*alone, ["r3", "pr2"]])
    # Replaying the rollout's routes takes the routers' part out of the mismatch; the other methods share what is left.
    assert first["r3"]["mismatch/kl_k3"] < first["grpo"]["mismatch/kl_k3"]
    assert first["grpo"]["mismatch/kl_k3"] == first["gspo"]["mismatch/kl_k3"] == first["r2"]["mismatch/kl_k3"]
    # Before its first step the trainer agrees with its own old-log-prob pass, not quite with the bfloat16 rollout.
    assert first["r2"]["routing/agreement_step_1"] == 1.0
    assert first["r3"]["routing/agreement_step_1"] < 1.0


def test_pr2_rolls_out_under_the_predictor_that_was_fitted_before_and_evaluates_without(compared: Compared) -> None:
    store = compared.store("at-once")
    fitted, rollout, routes, evaluation = (
        store.committed(stage, n) for stage, n in (("predictor", 0), ("rollout", 1), ("routes", 1), ("evaluation", 1))
    )
    assert fitted is not None
    assert rollout is not None
    assert routes is not None
    assert evaluation is not None
    assert rollout.commit.inputs["predictor"] == fitted.ref
    assert RouteArchive.open(routes).provenance.origins[0].predictor_sha256 == fitted.ref.sha256
    assert compared.metrics("at-once", 0)["predictor/layers_used"] > 0
    assert "predictor/merge_fidelity" in compared.metrics("at-once", 1)
    assert "predictor" not in evaluation.commit.inputs
    assert store.commit_of("predictor", 1) is not None


def test_a_rollout_one_step_off_is_of_the_policy_before_and_training_goes_on_from_its_own(compared: Compared) -> None:
    store = compared.store("one-step-off")
    first, rollout, routes, training = (
        store.committed(stage, n) for stage, n in (("rollout", 0), ("rollout", 1), ("routes", 1), ("training", 1))
    )
    assert first is not None
    assert rollout is not None
    assert routes is not None
    assert training is not None
    initial, trained = first.commit.inputs["policy"], store.commit_of("training", 0)
    assert rollout.commit.inputs == {"policy": initial}
    assert training.commit.inputs == {"policy": trained, "rollout": rollout.ref, "routes": routes.ref}
    assert RouteArchive.open(routes).provenance.origins[0].weights_sha256 == initial.sha256
    staleness = [compared.metrics("one-step-off", n)["rollout/staleness_mean"] for n in (0, 1)]
    assert staleness == [0, 1]
    # The first batch is that of r3, and so is what is learned from it; the second is of other weights.
    assert first.commit.objects == compared.store("r3").committed("rollout", 0).commit.objects
    kl = "mismatch/kl_k3"
    assert compared.metrics("one-step-off", 0)[kl] == compared.metrics("r3", 0)[kl]
    assert compared.metrics("one-step-off", 1)[kl] > 2 * compared.metrics("r3", 1)[kl]


def test_the_authors_variant_predicts_in_the_old_log_prob_pass_and_leaves_the_rollout_alone(
    compared: Compared,
) -> None:
    store = compared.store("in-the-old-pass")
    training, rollout = store.committed("training", 1), store.committed("rollout", 1)
    assert training is not None
    assert rollout is not None
    assert training.commit.inputs["predictor"] == store.commit_of("predictor", 0)
    assert "predictor" not in rollout.commit.inputs
    # What is replayed is what the ratio starts from: nothing has moved at the first mini-step.
    steps = json.loads(training.read_bytes("metrics.json"))["mini_steps"]
    assert steps[0]["policy/ratio_max"] == 1.0
    steered = compared.metrics("in-the-old-pass", 0)["predictor/layers_used"]
    assert training.commit.metrics["predictor/layers_steered"] == steered
    assert is_served(compared.metrics("in-the-old-pass", 1)) == float(steered > 0)


def test_a_comparison_reports_all_its_runs_and_groups_them_in_mlflow(compared: Compared, home: Path) -> None:
    report = Path(compared.said["report"])
    assert compared.said["runs"] == [f"all-{method}-s0" for method in PRESETS]
    assert compared.said["failed"] == []
    assert (report / "report.html").read_text().count("data:image/png;base64,") >= 7
    assert json.loads((report / "comparison.json").read_text())["groups"][0]["baseline"] == "grpo"

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("moe-replay")
    assert experiment is not None
    grouped = client.search_runs([experiment.experiment_id], "tags.comparison = 'all'")
    names = {run.info.run_name: run for run in grouped}
    assert set(names) == {"all", *compared.said["runs"]}
    assert "report.html" in {file.path for file in client.list_artifacts(names["all"].info.run_id)}
    figures = client.list_artifacts(names["all-r3-s0"].info.run_id, "figures")
    assert {file.path for file in figures} == {f"figures/{name}" for name in (DASHBOARD, LAYERS, LAYER_TABLE)}


@pytest.mark.slow
def test_replaying_the_rollout_cuts_the_mismatch_to_a_third(tmp_path: Path) -> None:
    p90 = {}
    for method in ("grpo", "r3"):
        command = ("run", f"--method={method}", f"--run-id=long-{method}", "--iterations=20", f"--root={tmp_path}")
        kl = sorted(metrics["mismatch/kl_k3"] for metrics in run_json(*command)["iterations"])
        p90[method] = kl[17]

    assert p90["grpo"] > 3 * p90["r3"]


@pytest.mark.slow
def test_a_longer_pr2_run_predicts_and_stays_as_steady_as_replay(tmp_path: Path) -> None:
    said = run_json("run", "--method=pr2", "--run-id=long-pr2", "--iterations=20", f"--root={tmp_path}")
    served = [metrics for metrics in said["iterations"] if "predictor/merge_fidelity" in metrics]

    assert served, "no predictor was ever used"
    assert all(metrics["predictor/merge_fidelity"] < 1 for metrics in served)  # gates are rounded to bfloat16
    assert sorted(metrics["mismatch/kl_k3"] for metrics in said["iterations"])[17] < 6e-4


def test_a_run_killed_twice_goes_on_at_its_first_uncommitted_stage_to_the_same_bytes(
    exact_run: tuple[Path, dict[str, Any]], tmp_path: Path, home: Path, prefect_api: str
) -> None:
    machine = Machine(tmp_path, home / "embedded", f"sqlite:///{home / 'mlflow.db'}", prefect_api)
    run = KilledRun(machine, tmp_path / "runs", {**PATIENT, "iterations": 2}, 2 * len(STAGES), random.Random(5))

    run.kill("flow", after=2, then="run again")
    run.kill("everything", after=3, then="fresh checkout")
    run.finish()

    assert [one.problem for one in run.kills] == [None, None]
    assert run.problems(exact_run[0], mlflow(), 2) == []


def test_interrupt_ends_everything_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a terminal: a server of the command's own, and Ctrl-C for the whole process group.
    monkeypatch.delenv("PREFECT_API_URL")
    process = start("run", "--run-id=stopped", "--iterations=9", f"--root={tmp_path}", settings=EXACT, group=True)
    wait_for(tmp_path / "stopped/iterations/00000/training", "_committed.json")
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)

    assert process.returncode == 130, err
    assert "resume stopped" in err
    assert psutil.wait_procs(family, timeout=10)[1] == [], "something outlived the command"


@pytest.mark.slow
def test_interrupted_comparison_says_how_to_go_on(tmp_path: Path) -> None:
    asked = ("compare", "--methods=grpo,r3", "--seeds=0", "--iterations=9", f"--root={tmp_path}")
    process = start(*asked, settings=EXACT, group=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*-grpo-s0/iterations/00000/training/_committed.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)

    assert process.returncode == 130, err
    name = re.search(r"comparison (\S+): 2 runs", out)
    assert name is not None
    assert f"--root={tmp_path}" in err
    assert f"--name {name[1]}" in err
    assert not list(tmp_path.glob("*-r3-s0")), "the comparison went on to its next run"


def test_stage_whose_engine_dies_is_retried_with_a_fresh_one_and_a_second_runner_is_refused_meanwhile(
    tmp_path: Path, prefect_api: str
) -> None:
    process = start("run", "--run-id=lost", "--iterations=1", f"--root={tmp_path.as_uri()}", settings=EXACT)
    wait_for(tmp_path / "lost/iterations/00000", "_attempt-training-*/_attempt.json")
    for engine in psutil.Process(process.pid).children():
        if "multiprocessing.spawn" in " ".join(engine.cmdline()):
            os.kill(engine.pid, signal.SIGKILL)
    second = start("resume", "lost", f"--root={tmp_path.as_uri()}", "--json")
    refused = second.communicate(timeout=120)
    out, err = process.communicate(timeout=600)

    assert (second.returncode, refused[0]) == (1, "")
    assert f"pid {process.pid} runs it since" in refused[1]
    assert process.returncode == 0, err
    assert "\ntraining-0 is tried again, attempt 2 of 3: the training engine" in out
    assert not (tmp_path / "lost/_lease").exists()
    assert RunStore(tmp_path.as_uri(), "lost").commit_of("evaluation", 0) is not None
    attempts = {task["name"]: task["run_count"] for task in tasks_of(prefect_api, ["train-lost", "lost-0"])}
    assert (attempts["rollout-0"], attempts["training-0"]) == (1, 2)
    again = start("resume", "lost", f"--root={tmp_path.as_uri()}", "--quiet")
    assert again.communicate(timeout=120)[0] == "lost\n"


@pytest.mark.slow
def test_training_that_finds_no_memory_is_retried_on_a_fresh_engine_with_smaller_micro_batches(
    exact_run: tuple[Path, dict[str, Any]], tmp_path: Path, prefect_api: str, home: Path
) -> None:
    for stage in ("rollout", "routes"):
        shutil.copytree(exact_run[0] / "iterations/00000" / stage, tmp_path / "exact/iterations/00000" / stage)
    settings = {**EXACT, "iterations": 2, "stages.retry_delay_seconds": 0}
    script = Path(__file__).with_name("training_without_memory.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path.as_uri(), "exact", json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": f"{script.parent.parent}:{os.environ.get('PYTHONPATH', '')}"},
    )

    assert done.returncode == 0, done.stderr
    told = re.search(r"in micro-batches of up to (\d+), ran out of memory .*can't allocate memory", done.stderr)
    assert told is not None, done.stderr
    training = RunStore(tmp_path.as_uri(), "exact").committed("training", 0)
    assert training is not None
    assert training.commit.attributes["micro_batch_tokens"] == int(told[1]) // 2
    # The config that the run is known by stays.
    undisturbed = RunStore(exact_run[0].parent.as_uri(), "exact").committed("training", 0)
    assert undisturbed is not None
    assert training.commit.config_digest == undisturbed.commit.config_digest
    assert "micro_batch_tokens" not in undisturbed.commit.attributes


@pytest.mark.slow
def test_permanent_error_fails_the_stage_at_once(
    exact_run: tuple[Path, dict[str, Any]], tmp_path: Path, prefect_api: str
) -> None:
    folder = tmp_path / "exact"
    shutil.copytree(exact_run[0], folder)
    shutil.rmtree(folder / "iterations/00001/training")
    shutil.rmtree(folder / "iterations/00001/evaluation")
    weights = folder / "iterations/00000/training/checkpoint/huggingface/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")

    process = start("resume", "exact", f"--root={tmp_path.as_uri()}", "--json")
    out, err = process.communicate(timeout=600)

    assert (process.returncode, out) == (1, "")
    assert "model.safetensors was altered" in err
    assert "Traceback" not in err
    newest = max(tasks_of(prefect_api, ["exact-1"]), key=lambda task: task["created"])
    assert (newest["name"], newest["run_count"]) == ("training-1", 1)


def test_status_and_inspect_read_storage_alone(exact_run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = exact_run
    root = f"--root={folder.parent.as_uri()}"

    stages = run_json("status", "exact", root)["stages"]
    inspected = run_json("archive", "inspect", "exact", root)

    assert {(stage["iteration"], stage["stage"]) for stage in stages} == {(n, s) for n in (0, 1) for s in STAGES}
    assert all(stage["state"] == "committed" and stage["bytes"] > 0 and stage["seconds"] > 0 for stage in stages)
    sequences = SMALL["rollout.prompts"] * SMALL["rollout.responses"]
    assert inspected["sequences"] == inspected["missing_rows"] == sequences
    assert inspected["captured_rows"] == inspected["tokens"] - sequences
    assert (inspected["layers"], inspected["experts"], inspected["top_k"]) == (4, 16, 2)
    assert inspected["provenance"]["iteration"] == 1
    policy = RunStore(folder.parent.as_uri(), "exact").commit_of("training", 0)
    assert policy is not None
    assert inspected["provenance"]["origins"][0]["weights_sha256"] == policy.sha256


def test_verify_names_a_damaged_object(exact_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(exact_run[0], tmp_path / "exact")
    chunks = (tmp_path / "exact/iterations/00001/routes/routes/ids/c").rglob("*")
    damaged = next(path for path in chunks if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")

    process = start("archive", "verify", "exact", f"--root={tmp_path.as_uri()}", "--json")
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 1
    assert any("iterations/00001/routes" in problem for problem in json.loads(out)["problems"])


def wait_for(folder: Path, pattern: str) -> None:
    """Wait until a file of this pattern exists in the folder."""
    deadline = time.monotonic() + 200
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{folder}/{pattern} did not appear"
        time.sleep(0.02)
