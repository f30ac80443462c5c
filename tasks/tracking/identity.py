"""A training run's MLflow run: how it is found again, what it is created with, and what it tells of settings."""

from collections.abc import Mapping
from typing import Any

from prefect.runtime import flow_run

from moe_replay.archive.layout import ABOUT_KEY
from moe_replay.archive.superseding import generation_in, generation_of
from moe_replay.config import RunConfig
from moe_replay.dotted import dotted
from moe_replay.places import as_argument
from moe_replay.preparation import package_versions
from moe_replay.stages.run import Run
from tasks.links import prefect_page

RUN_KEY = "moe_replay.run"
"""Tag by which a training run finds its MLflow run again."""
FORKED_FROM = "forked_from"
"""Tag of a fork: `run@iteration`."""
SUPERSEDED_BY = "superseded_by"
"""Tag of an MLflow run whose iterations were partly superseded: the id of the one that took its place."""
COMPARISON = "comparison"
"""Tag that the runs of one comparison share."""
ITERATIONS = "moe_replay.iterations_logged"
"""Tag: how many iterations are logged."""
FLOW_RUN, FLOW_RUN_PAGE = "prefect.flow_run", "prefect.flow_run_page"
"""Tags that name the Prefect flow run of the newest attempt."""
_SETTINGS_LOGGED = "moe_replay.settings_logged"


def find_run(client: Any, experiment_id: str, run: Run) -> Any:
    """The MLflow run of a training run, or of an evaluation, as it is now; none before the first attempt."""
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key_of(run)}'", max_results=1)
    return found[0] if found else None


def create_run(client: Any, experiment_id: str, run: Run) -> Any:
    """Create the MLflow run of a training run."""
    return client.create_run(experiment_id, run_name=run.run_id, tags=_tags(run))


def iterations_logged(tracked: Any) -> int:
    """How many iterations of a training run its MLflow run has."""
    return int(tracked.data.tags.get(ITERATIONS, "0"))


def tell_attempt(client: Any, tracked: Any, run: Run) -> None:
    """Name the present flow run in tags and note; the rest of the note stays, which the user may have edited."""
    from mlflow.entities import RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    page, note = prefect_page(), tracked.data.tags.get(MLFLOW_RUN_NOTE, "")
    if before := tracked.data.tags.get(FLOW_RUN_PAGE):
        note = note.replace(before, page)
    tags = {FLOW_RUN: str(flow_run.id), FLOW_RUN_PAGE: page, MLFLOW_RUN_NOTE: note}
    client.log_batch(tracked.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def key_of(run: Run, generation: int | None = None) -> str:
    """Tells a run from one of the same name that was deleted: where it is, and when and by whom it was created.

    Also from itself before something of it was superseded, whose points in MLflow can't be taken back.
    """
    document = run.store().read_run()
    created_as = document.get(ABOUT_KEY, {}).get("created_as", "")
    number = generation_in(document) if generation is None else generation
    return f"{run.store().name}#{created_as}{f'#{number}' if number else ''}"


def close_earlier(client: Any, experiment_id: str, run: Run, mlflow_run_id: str) -> None:
    """Tell what was logged before something was superseded that this MLflow run took its place."""
    for generation in range(generation_of(run.store())):
        wanted = f"tags.`{RUN_KEY}` = '{key_of(run, generation)}'"
        for earlier in client.search_runs([experiment_id], wanted):
            client.set_tag(earlier.info.run_id, SUPERSEDED_BY, mlflow_run_id)
            if earlier.info.status == "RUNNING":
                client.set_terminated(earlier.info.run_id, "KILLED")


def log_settings(client: Any, tracked: Any, config: RunConfig) -> None:
    """Log the config and the packages' versions, unless they are there, and anew what may change."""
    if _SETTINGS_LOGGED not in tracked.data.tags:
        _log_params(client, tracked.info.run_id, config)
    _log_changeable(client, tracked.info.run_id, config, tracked.data.tags)


def _tags(run: Run) -> dict[str, str]:
    """What a run's MLflow run is created with."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    config = run.config
    return {
        RUN_KEY: key_of(run),
        "method": config.method.label,
        "route_source": config.method.route_source,
        "model": config.model.path,
        "kappa": str(config.training.mini_steps),
        "seed": str(config.seed),
        **({COMPARISON: config.tracking.comparison} if config.tracking.comparison else {}),
        **({FORKED_FROM: f"{run.forked_from.run_id}@{run.forked_from.iteration}"} if run.forked_from else {}),
        ITERATIONS: "0",
        FLOW_RUN_PAGE: prefect_page(),
        MLFLOW_RUN_NOTE: _note(run, prefect_page()),
    }


def _note(run: Run, page: str) -> str:
    name = as_argument(run.run_id, run.config.storage.root)
    return (
        f"Artifacts: `{run.store().name}`\n\n"
        f"Prefect: [flow run of the newest attempt]({page})\n\n"
        f"Look with `moe-replay status {name}`, go on with `moe-replay resume {name}`.\n"
    )


def _log_params(client: Any, run_id: str, config: RunConfig) -> None:
    from mlflow.entities import Param

    settings = dotted(config.model_dump(mode="json"))
    # Charts have axes of parameters, not of tags.
    settings |= {"method": config.method.label, "kappa": config.training.mini_steps}
    versions = {f"version.{name}": number for name, number in package_versions().items()}
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in (settings | versions).items()])
    client.log_dict(run_id, config.model_dump(mode="json"), "config.json")
    client.set_tag(run_id, _SETTINGS_LOGGED, "true")


def _log_changeable(client: Any, run_id: str, config: RunConfig, before: Mapping[str, str]) -> None:
    """Log what may change while a run goes on, as tags and as `config.json`: parameters can't be overwritten."""
    from mlflow.entities import RunTag

    now = {"iterations": str(config.iterations), "evaluation": config.evaluation.model_dump_json()}
    if any(before.get(key) != value for key, value in now.items()):
        client.log_dict(run_id, config.model_dump(mode="json"), "config.json")
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in now.items()])
