"""`moe-replay archive diff`: where the routes of two runs differ."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from moe_replay.analysis.agreement_figure import draw_agreement
from moe_replay.analysis.comparison import compare_routes
from moe_replay.analysis.differences import Comparison
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.cli.archive import open_archive
from moe_replay.cli.console import Json, Root, command_name, out, root_of, run_and_iteration
from moe_replay.drawing import check_figure
from moe_replay.places import as_argument
from moe_replay.stages.samples import read_answers

_WORST_SHOWN = 5


def diff(a: str, b: str, *, figure: Path | None = None, root: Root = None, json_: Json = False) -> None:
    """Compare the routes of two runs: are the tokens the same, how far do experts agree, where do they part?

    Parameters
    ----------
    a
        A run, or RUN@ITERATION; by default its last iteration that has routes.
    b
        Another, of the same model.
    figure
        Also draw a heat map, layers by token position, to this PNG file.
    """
    if figure is not None:
        check_figure(figure)
    (store_a, routes_a), (store_b, routes_b) = (_open(name, root_of(root)) for name in (a, b))
    prompts = _prompt_tokens(store_a, routes_a) or _prompt_tokens(store_b, routes_b)
    comparison = compare_routes(routes_a, routes_b, prompts)
    if figure is not None:
        draw_agreement(comparison, figure)
    if json_:
        print(comparison.model_dump_json())
        return
    _show(comparison)
    _say_next(comparison, figure, root)


def _open(name: str, root: str) -> tuple[RunStore, RouteArchive]:
    run_id, iteration = run_and_iteration(name)
    store = RunStore(root, run_id)
    return store, open_archive(store, iteration)


def _prompt_tokens(store: RunStore, routes: RouteArchive) -> dict[bytes, int]:
    """Length of the prompt by token digest, of the rollout that the routes are of; empty where it isn't stored."""
    rollout = store.committed("rollout", routes.provenance.iteration)
    if rollout is None or rollout.expiry is not None:
        return {}
    return {answer.token_digest: len(answer.prompt_ids) for answer in read_answers(rollout)}


def _show(found: Comparison) -> None:
    table = Table(title=f"routes of a = {found.a} and b = {found.b}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in _summary(found).items():
        table.add_row(escape(name), escape(value))
    out.print(table)
    if found.agreement is None:
        return
    layers = Table(title="by layer", title_justify="left")
    for heading in ("decoder layer", "agreement", "sets differ", "sequences that part", "first at (median)"):
        layers.add_column(heading, justify="right")
    for row in found.layers:
        layers.add_row(
            str(row.layer),
            _share(row.agreement),
            _share(row.router_fraction),
            f"{row.parted_sequences:,}",
            "-" if row.first_position is None else f"{row.first_position:,.0f}",
        )
    out.print(layers)
    if found.agreement < 1:
        out.print(_worst(found))


def _summary(found: Comparison) -> dict[str, str]:
    parting = found.parting
    rows = {
        "same tokens": "yes" if found.same_tokens else "no",
        "sequences in both, only in a, only in b": f"{found.shared_sequences:,}, {found.only_a_sequences:,}, "
        f"{found.only_b_sequences:,}",
        "tokens compared, of those in both": f"{found.compared_rows:,} of {found.shared_tokens:,}",
        "routes missing in a, in b, in both": f"{found.missing_a_rows:,}, {found.missing_b_rows:,}, "
        f"{found.missing_both_rows:,}",
        f"agreement@{found.top_k}": _share(found.agreement),
    }
    if parting.in_prompt is not None:
        agreements = _share(found.prompt_agreement), _share(found.response_agreement)
        rows["  in prompts, in responses"] = ", ".join(agreements)
    rows["(token, layer) whose sets differ"] = _share(found.router_fraction)
    rows["tokens with such a layer"] = _share(found.token_fraction)
    rows["sequences that part"] = f"{parting.sequences:,}"
    if parting.in_prompt is not None:
        rows["  in the prompt, in the response"] = f"{parting.in_prompt:,}, {parting.in_response:,}"
    if parting.positions is not None:
        rows["  at position: least, quartiles, most"] = ", ".join(f"{position:,.0f}" for position in parting.positions)
    return rows


def _worst(found: Comparison) -> Table:
    table = Table(title="worst sequences", title_justify="left")
    for heading in ("in a", "in b", "tokens", "agreement", "part at token", "in decoder layer"):
        table.add_column(heading, justify="right")
    for row in found.worst[:_WORST_SHOWN]:
        first = ("-", "-") if row.first_position is None else (f"{row.first_position:,}", str(row.first_layer))
        table.add_row(str(row.sequence_a), str(row.sequence_b), f"{row.tokens:,}", _share(row.agreement), *first)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _say_next(found: Comparison, figure: Path | None, root: str | None) -> None:
    again = f"{command_name()} archive diff {found.a} {as_argument(found.b, root)}"
    if not found.shared_sequences:
        told = (
            "the two have no sequence in common; name iterations of the same prompts and seed as RUN@ITERATION\n"
            f"next:  {command_name()} status {as_argument(found.a.partition('@')[0], root)}"
        )
    elif figure is not None:
        told = f"drew {figure}\nnext:  {again} --json     (every number)"
    else:
        told = f"next:  {again} --figure diff.png     (a heat map)"
    out.print(escape(told), highlight=False, soft_wrap=True)
