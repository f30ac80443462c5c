"""`moe-replay predictor fit` and `report`: what predictors gain, from what a run stored."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from moe_replay.archive.artifacts import RunStore
from moe_replay.cli.console import Json, Root, command_name, out, root_of
from moe_replay.config_reading import parse_config, parse_override
from moe_replay.drawing import check_figure
from moe_replay.errors import ConfigError
from moe_replay.places import as_argument
from moe_replay.reports.predictor_figure import draw_predictor
from moe_replay.reports.predictor_report import LayerReport, PredictorReport, read_report
from moe_replay.sections import PredictorConfig

_SECTION = "predictor."


def fit(
    run_id: str,
    *,
    iteration: int | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    out_: Annotated[Path | None, Parameter(name="--out")] = None,
    figure: Path | None = None,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Fit predictors again from stored router evolution, with no engine and no GPU; the run is left as it is.

    They are judged as in the run. With the run's own settings the earlier fit that is judged is the run's; with others,
    and where the run has none, the iterations before are fitted with these settings too, so that what is said to have
    been served is what these settings would have served.

    Parameters
    ----------
    run_id
        The run; any that recorded router evolution (method pr2, or evolution.record = true).
    iteration
        By default the last that has evolution.
    set_
        A setting of the section predictor as key=value, for example predictor.ridge=1.0; may be repeated.
    out_
        Write predictor.safetensors, fitted.safetensors and report.json to this folder.
    figure
        Also draw gains by layer to this PNG file.
    """
    from moe_replay.plan import stored_config
    from moe_replay.stages.predictor import last_with_evolution, refit

    if figure is not None:
        check_figure(figure)
    store = RunStore(root_of(root), run_id)
    stored = stored_config(store)
    settings = _changed(stored.model_dump(mode="json"), set_ or [])
    if out_ is not None:
        _require_outside(out_, store)
    chosen = last_with_evolution(store) if iteration is None else iteration
    found = refit(store, settings, chosen, use_stored=settings == stored.predictor)
    if out_ is not None:
        _write(out_, found.objects())
    _tell(found.report, figure, json_)
    if not json_:
        drawn = "" if figure else "\n       add --figure gains.png     (gains by layer)"
        told = f"wrote {out_}\n" if out_ is not None else ""
        told += f"next:  {_call('fit', run_id, chosen, root)} --set predictor.objective=post_routing_kl{drawn}"
        out.print(escape(told), highlight=False, soft_wrap=True)


def report(
    run_id: str, *, iteration: int | None = None, figure: Path | None = None, root: Root = None, json_: Json = False
) -> None:
    """Show what the run's own fit of predictors found, layer by layer.

    Parameters
    ----------
    run_id
        The run.
    iteration
        By default the last that has predictors.
    figure
        Also draw gains by layer to this PNG file.
    """
    if figure is not None:
        check_figure(figure)
    store = RunStore(root_of(root), run_id)
    store.read_run()
    found = read_report(store, iteration)
    _tell(found, figure, json_)
    if not json_:
        told = (
            f"next:  {_call('fit', run_id, found.iteration, root)} --set predictor.ridge=1.0     (with other settings)"
        )
        out.print(escape(told), highlight=False, soft_wrap=True)


def _changed(document: dict[str, Any], overrides: list[str]) -> PredictorConfig:
    """The run's settings of predictors with some changed; raises ConfigError for keys of other sections."""
    changes = dict(parse_override(text) for text in overrides)
    foreign = [key for key in changes if not key.startswith(_SECTION)]
    if foreign:
        raise ConfigError(
            f"--set {foreign[0]}: a fit from stored evolution depends on the section predictor alone, for example "
            "predictor.objective; for anything else start a new run"
        )
    section = document["predictor"] | {key.removeprefix(_SECTION): value for key, value in changes.items()}
    return parse_config(document | {"predictor": section}).predictor


def _require_outside(folder: Path, store: RunStore) -> None:
    place = store.folder.local_folder
    if place is not None and folder.absolute().resolve().is_relative_to(place.resolve()):
        raise ConfigError(f"{folder} lies in the folder of run {store.run_id}, which is never changed; name another")


def _write(folder: Path, objects: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in objects.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written ({error.strerror}); choose another folder") from error


def _call(command: str, run_id: str, iteration: int, root: str | None) -> str:
    return f"{command_name()} predictor {command} {as_argument(f'{run_id} --iteration {iteration}', root)}"


def _tell(found: PredictorReport, figure: Path | None, as_json: bool) -> None:
    """Print the report, and draw it where that is wanted."""
    if figure is not None:
        draw_predictor(found, figure)
    if as_json:
        print(found.model_dump_json())
        return
    table = Table(title=escape(f"predictors of run {found.run_id}, iteration {found.iteration}"), title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in _summary(found).items():
        table.add_row(escape(name), escape(value))
    out.print(table)
    out.print(_by_layer(found))
    if figure is not None:
        out.print(escape(f"drew {figure}"), highlight=False, soft_wrap=True)


def _summary(found: PredictorReport) -> dict[str, str]:
    metrics, judged = found.metrics(), found.layers[0].judged
    fitted = f"{found.fitted_tokens:,} of iteration {', '.join(map(str, found.fitted_iterations))}"
    rows = {"objective": found.objective, "tokens fitted": fitted}
    if found.removed_iterations:
        rows["iterations removed by retention"] = str(found.removed_iterations)
    how = "earlier fits, each on the next iteration" if found.judged_on == "next_iteration" else "on prompts left out"
    rows["judged"] = how if judged.factors else "nothing: there is no fit before it"
    if judged.factors:
        rows["tokens judged, prompts"] = f"{judged.tokens:,}, {judged.groups:,}"
    rows["needed to be used, standard errors of KL"] = f"{found.evidence:g}"
    rows["layers used"] = f"{found.layers_used} of {len(found.layers)}"
    rows["|h W_p| over |p|"] = f"{found.bias_ratio:.2e}"
    served = metrics.get("predictor/kl"), metrics.get("predictor/agreement")
    rows["served this iteration: KL, of zero"] = f"{_number(served[0])}, {_number(metrics['predictor/kl_zero'])}"
    agreements = _share(served[1]), _share(metrics["predictor/agreement_zero"])
    rows[f"served this iteration: agreement@{found.top_k}, of zero"] = ", ".join(agreements)
    return rows


def _by_layer(found: PredictorReport) -> Table:
    table = Table(title="by layer, as judged (± one standard error)", title_justify="left")
    for heading in (
        "decoder layer",
        "KL of zero",
        "KL change %",
        "agreement of zero",
        "gain in points",
        "factor",
        "why 0",
    ):
        table.add_column(heading, justify="right")
    for layer in found.layers:
        table.add_row(*_cells(layer), layer.judged.why_zero(found.evidence))
    return table


def _cells(layer: LayerReport) -> list[str]:
    zero, one = layer.judged, layer.shown
    cells = [str(layer.layer), _number(zero.kl_zero), "-", _share(zero.agreement_zero), "-", "0"]
    if one is None:
        return cells
    share = 100 / zero.kl_zero if zero.kl_zero else 0.0
    cells[2] = _with_error(share * one.kl_change, one.kl_change_error, share)
    cells[4] = _with_error(100 * one.agreement_change, one.agreement_change_error, 100)
    cells[5] = f"{layer.factor:g}"
    return cells


def _with_error(value: float, error: float | None, scale: float) -> str:
    return f"{value:+.2f}" if error is None else f"{value:+.2f} ± {scale * error:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"
