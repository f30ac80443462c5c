"""`moe-replay counterfactual`: other methods' routes on the stored tokens of a run."""

import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Json, Root, command_name, err, out, root_of
from moe_replay.drawing import check_figure
from moe_replay.environment import make_home
from moe_replay.errors import ConfigError
from moe_replay.methods import Method
from moe_replay.reports.counterfactuals import Counterfactual, draw_counterfactual


def counterfactual(
    run_id: str,
    *,
    iteration: int | None = None,
    checkpoint: int | None = None,
    methods: Annotated[str | None, Parameter(help="Presets, parted by commas.")] = None,
    figure: Path | None = None,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Ask what R2, R3 or PR2 would have replayed on a run's stored tokens, and how far its routers have left that.

    Starts the training engine and nothing else; the run is not changed.

    Forced KL is what replaying a method's routes does to the policy after the update. It is estimated on the rollout's
    tokens, which were sampled before the update: compare methods by it on one rollout, not runs. KL to the rollout and
    extreme tokens are left out (-) where the method would have sampled from another policy than the one that did; they
    hold staleness too where the rollout is one step off or partly carried over.

    Parameters
    ----------
    run_id
        The run.
    iteration
        Whose rollout to take; by default that of the last iteration that was trained.
    checkpoint
        Against the policy after which iteration, none older than the one that is trained; by default after the same.
    methods
        Default: r2, r3 unless the rollout was served under a predictor, and pr2 where it was or where the run recorded
        router evolution before that iteration.
    figure
        Also draw agreement and coverage gap by layer to this PNG file.
    """
    if figure is not None:
        check_figure(figure)
    store = RunStore(root_of(root), run_id)
    store.read_run()
    found = _ask(store, iteration, checkpoint, methods, root)
    if figure is not None:
        draw_counterfactual(found, figure)
    if json_:
        print(found.model_dump_json())
        return
    _show(found)
    options = {"iteration": iteration, "checkpoint": checkpoint, "methods": methods, "root": root}
    asked = "".join(f" --{name} {value}" for name, value in options.items() if value is not None)
    further = (
        f"drew {figure}" if figure else f"next:  {command_name()} counterfactual {run_id}{asked} --figure by-layer.png"
    )
    out.print(escape(further), highlight=False, soft_wrap=True)


def _ask(
    store: RunStore, iteration: int | None, checkpoint: int | None, methods: str | None, root: str | None
) -> Counterfactual:
    from moe_replay.engines.pool import EnginePool
    from moe_replay.plan import stored_config
    from moe_replay.preparation import prepare
    from moe_replay.stages.replayable import require_replayable, tellable_methods

    config = stored_config(store)
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": root})})
    trained = [n for n in store.iterations() if store.commit_of("training", n) is not None]
    if not trained:
        raise ConfigError(f"run {store.run_id} has trained nothing yet; resume it first")
    taken = trained[-1] if iteration is None else iteration
    number = taken if checkpoint is None else checkpoint
    after = store.commit_of("training", number) if number in trained else None
    if after is None:
        raise ConfigError(f"run {store.run_id} has no checkpoint of iteration {number}; it has those of {trained}")
    chosen = _methods(methods.split(",") if methods is not None else tellable_methods(store, taken))
    require_replayable(store, taken, chosen)
    if number < taken - 1:
        raise ConfigError(
            f"the checkpoint of iteration {number} is older than the policy that iteration {taken} trains, that of "
            f"{taken - 1}, and no policy after it; take one from {taken - 1} on"
        )
    run = prepare(config, store.run_id, _progress)
    logs = make_home() / "logs" / store.run_id
    pool = EnginePool(run.model, run.model_sha256, config.rollout, config.training, logs, config.resources)
    try:
        call = "moe_replay.stages.counterfactual:replay_counterfactually"
        return pool.training().call(call, _progress, run, taken, after, chosen)
    finally:
        pool.close()


def _methods(names: list[str]) -> list[Method]:
    from moe_replay.config_reading import parse_config

    return [parse_config({"method": name}).method for name in dict.fromkeys(names)]


def _progress(done: int, total: int, what: str) -> None:
    if total and done == total:
        err.print(f"{done} of {total} {what}", highlight=False)


def _show(found: Counterfactual) -> None:
    title = f"routes of {found.run_id}, iteration {found.iteration}, against its policy after {found.checkpoint}"
    table = Table(title=escape(title), title_justify="left")
    for heading in ("method", "agreement", "coverage gap", "forced KL k3", "KL k3 to the rollout", "extreme"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, tried in found.methods.items():
        gap = "-" if math.isnan(tried.coverage_gap) else f"{tried.coverage_gap:.5f}"
        mismatch = "-" if tried.kl_k3 is None else f"{tried.kl_k3:.2e}"
        extreme = "-" if tried.extreme_fraction is None else f"{tried.extreme_fraction:.5f}"
        table.add_row(escape(method), f"{tried.agreement:.5f}", gap, f"{tried.forced_kl_k3:.2e}", mismatch, extreme)
    out.print(table)
    if found.layers_predicted is not None:
        out.print(f"predicted in {found.layers_predicted} of {len(found.layers)} layers", highlight=False)
