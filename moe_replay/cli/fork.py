"""`moe-replay fork`: a new run that goes on from another's iteration."""

import json
import time
import uuid
from typing import Annotated, Any

from cyclopts import Parameter

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Json, Root, Settings, command_name, err, out, root_of
from moe_replay.config_reading import parse_override
from moe_replay.places import as_argument


def fork(
    run_id: str,
    *,
    iteration: int,
    method: str | None = None,
    as_: Annotated[str | None, Parameter(name="--as")] = None,
    set_: Settings = None,
    new_root: str | None = None,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Create a run that goes on from what another committed before an iteration; nothing is copied, or trained yet.

    Every setting may differ but the model, `training.engine` and `training.lora`. With none that does, the new run
    makes the same iterations again.

    Parameters
    ----------
    run_id
        The run to start from; it stays as it is.
    iteration
        The first that the new run makes itself, at least 1.
    method
        grpo, gspo, tis, r2, r3 or pr2; by default the source's.
    as_
        Name of the new run.
    new_root
        fsspec URL under which the new run lies; by default beside the other.
    """
    from moe_replay.forking import fork_run, forked_config, left_behind

    url = root_of(root)
    source = RunStore(url, run_id)
    # A fork of a compared run is no part of the comparison.
    overrides: dict[str, Any] = {"storage.root": new_root or root, "tracking.comparison": None}
    if method is not None:
        overrides["method"] = method
    overrides |= dict(parse_override(text) for text in set_ or [])
    config = forked_config(source, overrides)
    name = as_ or f"{run_id[:42]}-{iteration}-{time.strftime('%m%d')}-{uuid.uuid4().hex[:4]}"
    made = fork_run(source, url, iteration, config, name, _progress)
    named = as_argument(name, config.storage.root)
    left = left_behind(source, config)
    if json_:
        about = {"run_id": name, "root": made.root, "forked_from": run_id, "first_iteration": iteration}
        print(json.dumps(about | {"prompts_left_behind": left.prompts if left else 0}))
        return
    if left:
        _say(
            f"left behind: {left.prompts} prompts that the rollout of iteration {iteration - 1} carried, with what was "
            f"sampled of their responses, because {', '.join(left.changed)} changed"
        )
    _say(
        f"run {name} goes on from iteration {iteration} of run {run_id}, whose checkpoint of iteration {iteration - 1} "
        f"it needs until it has trained; archive gc under this root leaves it alone\n"
        f"next:  {command_name()} resume {named}"
    )


def _say(told: str) -> None:
    out.print(told, highlight=False, markup=False, soft_wrap=True)


def _progress(done: int, total: int, what: str) -> None:
    if done and done == total:
        err.print(f"{done} of {total} {what}", highlight=False)
