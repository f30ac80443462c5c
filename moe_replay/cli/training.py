"""`moe-replay run` and `resume`: start a run, or go on with one."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from moe_replay.alarm import Action
from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Json, Quiet, Root, Settings, root_of
from moe_replay.cli.running import holding_from_here, train_here
from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, overridden, parse_override
from moe_replay.errors import ConfigError, RunInUse

AllowConfigChange = Annotated[
    list[str] | None,
    Parameter(
        name="--allow-config-change",
        negative="",
        help="A key in which the run's config may change: iterations, evaluation or any below it; may be repeated.",
    ),
]


def run(
    config: Path | None = None,
    *,
    method: str | None = None,
    iterations: int | None = None,
    run_id: str | None = None,
    set_: Settings = None,
    allow_config_change: AllowConfigChange = None,
    root: Root = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a policy with routing replay.

    Parameters
    ----------
    config
        A TOML file; by default the embedded model and task.
    method
        grpo, gspo, tis, r2, r3 or pr2.
    iterations
        Rollout-and-train cycles.
    run_id
        Name of the run; a name that exists continues that run.
    """
    overrides: dict[str, Any] = {}
    if method is not None:
        overrides["method"] = method
    if iterations is not None:
        overrides["iterations"] = iterations
    overrides |= dict(parse_override(text) for text in set_ or [])
    if root is not None:
        overrides["storage.root"] = root
    settings = load_config(config, overrides)
    if run_id is None:
        run_id = f"{settings.method.name}-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    train_here(settings, run_id, allow_config_change or [], json_, quiet)


def resume(
    run_id: str,
    *,
    decide: Action | None = None,
    set_: Settings = None,
    allow_config_change: AllowConfigChange = None,
    from_stage: str | None = None,
    iteration: int | None = None,
    yes: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a run at its first stage that is not committed, with the config it was started with.

    Parameters
    ----------
    run_id
        The run.
    decide
        What becomes of the batch that the stability alarm stopped at.
    from_stage
        First supersede what this stage (rollout, routes, training, predictor, evaluation) of --iteration committed, and
        all that was made from it; it is made again, and kept for archive gc.
    iteration
        Of --from-stage, counted from 0.
    yes
        Supersede without asking; needed where nobody can be asked.
    """
    from moe_replay.cli.superseding import supersede_from
    from moe_replay.plan import stored_config
    from moe_replay.preparation import preflight

    store = RunStore(root_of(root), run_id)
    stored = stored_config(store)
    overrides = dict(parse_override(text) for text in set_ or [])
    allowed = allow_config_change or []
    config = overridden(stored, {**overrides, "storage.root": root})
    if (from_stage is None) != (iteration is None):
        raise ConfigError("--from-stage and --iteration belong together; name the stage and iteration to go back to")
    if decide is not None and from_stage is not None:
        raise ConfigError(
            "--decide is for the batch that waits, and --from-stage takes back what was decided; go back first, and "
            "decide when the alarm is raised again"
        )
    with _told_of_pause(decide), holding_from_here(config, run_id):
        if decide is not None or from_stage is not None:
            # What could not go on afterwards is told before anything is decided or taken back.
            preflight(config, run_id, allowed)
        if decide is not None:
            _decide(store, config, decide)
        if from_stage is not None and iteration is not None:
            supersede_from(store, from_stage, iteration, yes, quiet)
        train_here(config, run_id, allowed, json_, quiet)


@contextmanager
def _told_of_pause(decide: Action | None) -> Iterator[None]:
    """Say where a flow run that is paused is answered, to who wants to decide from here."""
    try:
        yield
    except RunInUse as error:
        if decide is None:
            raise
        raise RunInUse(
            f"{error}; if that is a flow run which is paused for the decision, answer in Prefect (Resume), or cancel "
            "it and repeat this"
        ) from error


def _decide(store: RunStore, config: RunConfig, action: Action) -> None:
    from moe_replay.stages.decisions import waiting_batch

    batch = waiting_batch(store)
    if batch is None:
        raise ConfigError(
            f"run {store.run_id} waits for no decision: no batch of it stopped at the stability alarm; resume it "
            "without --decide"
        )
    batch.decide(config, action, "person")
