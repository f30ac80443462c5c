"""What MLflow and Prefect show of a run."""

import json
from pathlib import Path
from typing import Any

from asking import ask, checkpoints, mlflow, mlflow_steps, tasks_of, until
from command import SMALL

from moe_replay.archive.artifacts import RunStore
from tasks.heartbeats import HEARTBEAT

STAGES = {"rollout", "routes", "training", "evaluation"}


def test_mlflow_holds_settings_and_every_metric_by_iteration(exact_run: tuple[Path, dict[str, Any]]) -> None:
    _, said = exact_run

    tracked = mlflow().get_run(said["mlflow_run_id"])

    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "exact"
    for kept in (tracked.data.tags, tracked.data.params):
        assert (kept["method"], kept["kappa"], kept["seed"]) == ("r3", "2", "0")
    assert tracked.data.params["rollout.dtype"] == "float32"
    assert "version.verl" in tracked.data.params
    for key in said["iterations"][0]:
        assert mlflow_steps(said["mlflow_run_id"], key) == [0, 1]
    config = mlflow().download_artifacts(said["mlflow_run_id"], "config.json")
    assert json.loads(Path(config).read_text())["rollout"]["prompts"] == SMALL["rollout.prompts"]


def test_mlflow_names_the_data_and_has_a_model_for_each_evaluated_checkpoint(
    exact_run: tuple[Path, dict[str, Any]],
) -> None:
    folder, said = exact_run
    tracked, store = mlflow().get_run(said["mlflow_run_id"]), RunStore(folder.parent.as_uri(), "exact")

    used = {one.tags[0].value: one.dataset for one in tracked.inputs.dataset_inputs}
    assert {context: data.name for context, data in used.items()} == {"training": "train", "evaluation": "addition"}
    train = store.read_run()["train_sha256"]
    assert json.loads(used["training"].profile)["sha256"] == train
    assert train.startswith(used["training"].digest)

    models = checkpoints(said["mlflow_run_id"])
    assert [(model.name, model.status) for model in models] == [("exact-00000", "READY"), ("exact-00001", "READY")]
    training = store.committed("training", 1)
    assert training is not None
    assert models[1].params["sha256"] == training.ref.sha256
    assert models[1].params["uri"] == f"{training.name}/checkpoint"
    scores = {metric.key: metric for metric in models[1].metrics}
    assert scores["eval/addition/avg_at_n"].value == said["iterations"][1]["eval/addition/avg_at_n"]
    assert scores["eval/addition/avg_at_n"].dataset_digest == used["evaluation"].digest
    assert {(output.model_id, output.step) for output in tracked.outputs.model_outputs} == {
        (model.model_id, iteration) for iteration, model in enumerate(models)
    }


def test_mlflow_and_prefect_lead_to_each_other_and_to_storage(
    exact_run: tuple[Path, dict[str, Any]], prefect_api: str
) -> None:
    folder, said = exact_run
    tracked = mlflow().get_run(said["mlflow_run_id"])
    flow_run_id = tracked.data.tags["prefect.flow_run"]
    (flow_run,) = ask(f"{prefect_api}/flow_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})
    shown = ask(f"{prefect_api}/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}})
    overviews = [artifact for artifact in shown if artifact["key"] == "run-exact"]
    overview = max(overviews, key=lambda artifact: artifact["created"])["data"]
    page = f"{prefect_api.removesuffix('/api')}/runs/flow-run/{flow_run_id}"

    assert (flow_run["name"], flow_run["state"]["type"]) == ("train-exact", "COMPLETED")
    for told in (tracked.data.tags["mlflow.note.content"], overview):
        assert f"`{folder.as_uri()}`" in told
        assert f"moe-replay resume exact --root {folder.parent.as_uri()}" in told
    assert f"({page})" in tracked.data.tags["mlflow.note.content"]
    assert f"/#/experiments/{tracked.info.experiment_id}/runs/{tracked.info.run_id})" in overview
    assert "| iteration | rollout | routes | training | evaluation | total |" in overview


def test_mlflow_samples_the_machine_while_a_run_works(exact_run: tuple[Path, dict[str, Any]]) -> None:
    steps = mlflow_steps(exact_run[1]["mlflow_run_id"], "system/cpu_utilization_percentage")
    assert steps == list(range(len(steps)))
    assert steps


def test_prefect_shows_iterations_with_their_stages_and_the_results_table(
    exact_run: tuple[Path, dict[str, Any]], prefect_api: str
) -> None:
    own = {task["name"] for task in tasks_of(prefect_api, ["exact-0", "exact-1"])}
    between = {task["name"] for task in tasks_of(prefect_api, ["train-exact"])}
    tables = ask(f"{prefect_api}/artifacts/filter", {"artifacts": {"key": {"any_": ["results-exact"]}}})

    begun_before = {f"rollout-{n}" for n in (0, 1)}
    assert {f"{stage}-{n}" for stage in STAGES for n in (0, 1)} - begun_before <= own
    assert begun_before | {"track-0", "track-1"} <= between
    rows = json.loads(tables[-1]["data"])
    assert "mismatch/kl_k3" in rows[0]


def test_iterations_give_signs_of_life_that_the_alerts_find(
    exact_run: tuple[Path, dict[str, Any]], prefect_api: str
) -> None:
    runs = ask(f"{prefect_api}/flow_runs/filter", {"flow_runs": {"name": {"any_": ["exact-1"]}}})
    wanted = {"event": {"name": [HEARTBEAT]}, "resource": {"id": [f"prefect.flow-run.{run['id']}" for run in runs]}}

    def beats() -> list[dict[str, Any]]:
        return ask(f"{prefect_api}/events/filter", {"filter": wanted})["events"]

    for beat in until(beats, "no heartbeat of an iteration reached the server"):
        flows = [one for one in beat["related"] if one["prefect.resource.role"] == "flow"]
        assert [one["prefect.resource.name"] for one in flows] == ["iteration"]
