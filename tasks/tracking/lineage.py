"""What a run was made from and what it made, in MLflow: its data sets, and its evaluated checkpoints as models.

Data and weights stay where they are, MLflow gets names, digests and places. Everything here may be repeated.
"""

import json
from typing import Any

from moe_replay.archive.artifacts import ArtifactRef
from moe_replay.archive.layout import CHECKPOINT_FOLDER
from moe_replay.stages.run import DataFile, Run

MODEL_TYPE = "checkpoint"
_DIGEST_LENGTH = 12
"""Enough to tell files apart, and short enough for columns; the profile has the whole."""


def log_data(client: Any, run: Run, mlflow_run_id: str) -> None:
    """Name the training file and each benchmark as inputs of the MLflow run."""
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    used = [(run.train.path.stem, run.train, "training")]
    used += [(name, file, "evaluation") for name, file in run.benchmarks.items()]
    inputs = [
        DatasetInput(_dataset(name, file), [InputTag(MLFLOW_DATASET_CONTEXT, context)]) for name, file, context in used
    ]
    client.log_inputs(mlflow_run_id, inputs)


def dataset_digest(file: DataFile) -> str:
    """The start of the file's sha256, by which MLflow tells data sets of one name apart."""
    return file.sha256[:_DIGEST_LENGTH]


def log_checkpoint(client: Any, run: Run, tracked: Any, iteration: int) -> str:
    """The id of the MLflow model that stands for an iteration's checkpoint, which is created the first time.

    Models are external: their params say where the weights lie and which commit they are.
    """
    from mlflow.entities import LoggedModelOutput

    training = run.store().commit_of("training", iteration)
    assert training is not None, "what was evaluated was trained"
    model = _find(client, tracked.info, run, iteration, training) or _create(
        client, tracked.info, run, iteration, training
    )
    if model.status != "READY":
        _finish(client, model)
    if model.model_id not in {output.model_id for output in tracked.outputs.model_outputs}:
        client.log_outputs(tracked.info.run_id, [LoggedModelOutput(model.model_id, iteration)])
    return model.model_id


def _dataset(name: str, file: DataFile) -> Any:
    from mlflow.entities import Dataset

    return Dataset(
        name,
        dataset_digest(file),
        source_type="local",
        source=json.dumps({"uri": file.path.as_uri()}),
        profile=json.dumps({"sha256": file.sha256, "bytes": file.path.stat().st_size}),
    )


def _name(run: Run, iteration: int) -> str:
    # MLflow takes no dots in names of models; the source run tells apart what this makes alike.
    return f"{run.run_id.replace('.', '-')}-{iteration:05d}"


def _find(client: Any, tracked: Any, run: Run, iteration: int, training: ArtifactRef) -> Any | None:
    wanted = f"name = '{_name(run, iteration)}' AND source_run_id = '{tracked.run_id}'"
    found = client.search_logged_models([tracked.experiment_id], f"{wanted} AND params.sha256 = '{training.sha256}'")
    return next(iter(found), None)


def _create(client: Any, tracked: Any, run: Run, iteration: int, training: ArtifactRef) -> Any:
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    config = run.config
    params = {
        "uri": f"{run.store().name}/{training.uri}/{CHECKPOINT_FOLDER}",
        "sha256": training.sha256,
        "iteration": str(iteration),
        "method": config.method.label,
        "kappa": str(config.training.mini_steps),
        "seed": str(config.seed),
    }
    tags = {MLFLOW_MODEL_IS_EXTERNAL: "true", "run": run.run_id, "base": config.model.path}
    return client.create_logged_model(
        tracked.experiment_id, _name(run, iteration), tracked.run_id, tags, params, MODEL_TYPE
    )


def _finish(client: Any, model: Any) -> None:
    """File the description without which MLflow's registry would not take the model, and mark it ready."""
    import tempfile
    from pathlib import Path

    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.models.utils import get_external_mlflow_model_spec

    with tempfile.TemporaryDirectory() as folder:
        get_external_mlflow_model_spec(model).save(str(Path(folder) / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
