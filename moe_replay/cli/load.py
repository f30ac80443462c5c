"""`moe-replay archive load`: how unevenly experts are loaded, and what another placement would bring."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from moe_replay.analysis.load import LoadStudy, study_loads
from moe_replay.analysis.load_figure import draw_loads, placement_title
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.cli.archive import open_archive
from moe_replay.cli.console import Json, Root, command_name, out, root_of
from moe_replay.drawing import check_figure
from moe_replay.places import as_argument


def load(
    run_id: str,
    *,
    iteration: int | None = None,
    devices: int = 8,
    micro_batch_tokens: int = 8192,
    slots: int | None = None,
    figure: Path | None = None,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Study the load of experts: how far the most loaded device would lie above the mean, under which placement?

    Placements are the two that need no plan (consecutive experts on a device, and expert e on device e mod DEVICES), a
    plan from the routes of the iteration before, one from this iteration's, and one for each micro-batch, as routes
    that are known before training allow. What it costs to move experts is not counted.

    Parameters
    ----------
    run_id
        The run.
    iteration
        By default the last that has routes.
    devices
        Over which the experts of each layer are spread.
    micro_batch_tokens
        Most tokens that go through the experts together.
    slots
        Experts that all devices together hold in a layer; by default one slot an expert. More hold replicas.
    figure
        Also draw loads and imbalance to this PNG file.
    """
    if figure is not None:
        check_figure(figure)
    store = RunStore(root_of(root), run_id)
    archive = open_archive(store, iteration)
    study = study_loads(archive, devices, slots, micro_batch_tokens, _previous(store, archive))
    if figure is not None:
        draw_loads(study, figure)
    if json_:
        print(study.model_dump_json())
        return
    _show(study)
    _say_next(study, figure, root)


def _previous(store: RunStore, archive: RouteArchive) -> RouteArchive | None:
    """The last archive before this one that still has its routes, if it is of the same model."""
    for iteration in reversed([n for n in store.iterations() if n < archive.provenance.iteration]):
        artifact = store.committed("routes", iteration)
        if artifact is not None and artifact.expiry is None:
            found = RouteArchive.open(artifact)
            return found if found.provenance.origins[0].model == archive.provenance.origins[0].model else None
    return None


def _show(study: LoadStudy) -> None:
    title = f"expert load of run {study.run_id}, iteration {study.iteration}, on {study.devices} devices"
    table = Table(title=escape(title), title_justify="left")
    for heading in ("placement", "slots", "imbalance", "worst", "against round robin"):
        is_name = heading == "placement"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    round_robin = study.imbalance_of("round_robin") or 1.0
    for found in study.placements:
        against = "-" if found.placement == "round_robin" else f"{found.imbalance / round_robin - 1:+.1%}"
        name = placement_title(found, study.num_experts)
        table.add_row(name, str(found.slots), f"{found.imbalance:.3f}", f"{found.worst:.3f}", against)
    out.print(table)
    hottest = max(zip(study.expert_imbalance_L, study.layers, strict=True))
    told = (
        f"imbalance: most loaded device over the mean, averaged over {len(study.layers)} layers and "
        f"{study.micro_batches:,} micro-batches of at most {study.micro_batch_tokens:,} tokens ({study.tokens:,} with "
        f"routes); a layer waits for that device\nhottest expert: {hottest[0]:.2f} times the mean of decoder layer "
        f"{hottest[1]}"
    )
    out.print(escape(told), highlight=False, soft_wrap=True)


def _say_next(study: LoadStudy, figure: Path | None, root: str | None) -> None:
    again = f"{command_name()} archive load {as_argument(study.run_id, root)}"
    if study.slots == study.num_experts and study.devices > 1:
        told = f"next:  {again} --slots {study.num_experts + study.devices}     (a replica on each device)"
    elif figure is None:
        told = f"next:  {again} --slots {study.slots} --figure load.png     (loads and placements drawn)"
    else:
        told = f"next:  {again} --slots {study.slots} --json     (every number, and the plan)"
    drew = "" if figure is None else f"drew {figure}\n"
    out.print(escape(drew + told), highlight=False, soft_wrap=True)
