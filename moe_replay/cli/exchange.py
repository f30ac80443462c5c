"""`moe-replay archive export` and `import`: routes to and from files of other programs."""

import json
import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import RouteArchive
from moe_replay.cli.archive import open_archive
from moe_replay.cli.console import Json, Root, command_name, out, root_of
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.exchange.exporting import EXPORT_FORMATS, ExportFormat, export_routes
from moe_replay.exchange.foreign_routes import ModelShape
from moe_replay.exchange.importing import ToldOrigin, import_routes
from moe_replay.places import as_argument
from moe_replay.routing.trace import route_dtype

_MAX_DECODER_LAYERS = 65536
_LAYERS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")


def export(
    run_id: str,
    out_file: Path,
    *,
    iteration: int | None = None,
    format_: Annotated[ExportFormat | None, Parameter(name="--format")] = None,
    layers: str | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Write the routes of an iteration to one file: Parquet, safetensors or npz.

    Parameters
    ----------
    run_id
        The run to export.
    out_file
        The file to write.
    iteration
        By default the last that has routes.
    format_
        By default what the file's name ends with.
    layers
        Decoder layers to export, for example 0-11,20; by default all.
    overwrite
        Replace a file that is there.
    """
    form = format_ or _format_of(out_file)
    chosen = None if layers is None else parse_layers(layers)
    opened = open_archive(RunStore(root_of(root), run_id), iteration)
    export_routes(opened, out_file, form, chosen, overwrite)
    told = {
        "file": str(out_file),
        "format": form,
        "bytes": out_file.stat().st_size,
        "tokens": opened.num_tokens,
        "sequences": opened.num_sequences,
        "layers": list(chosen or opened.layers),
    }
    if json_:
        print(json.dumps(told))
        return
    _say(
        f"wrote the routes of {opened.num_tokens:,} tokens in {len(told['layers'])} layers to {out_file} "
        f"({told['bytes']:,} bytes); docs/exchange.md says how to read them\n"
        f"next:  {command_name()} archive import {out_file} --run-id NAME     (where they are wanted)"
    )


def import_(
    file: Path,
    *,
    run_id: str,
    iteration: int = 0,
    model: Path | None = None,
    layers: str | None = None,
    experts: int | None = None,
    source: str | None = None,
    engine_version: str | None = None,
    dtype: str | None = None,
    weights_sha256: str | None = None,
    keep_order: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
    json_: Json = False,
) -> None:
    """Check routes captured elsewhere, or exported, and make them the routing archive of a run of their own.

    Parameters
    ----------
    file
        An export, JSON lines with routes of vLLM or SGLang, or safetensors of a verl batch (docs/exchange.md).
    run_id
        Name of the run that holds them.
    iteration
        Iteration that they become.
    model
        Folder with the config.json of the model that was served; an export needs none.
    layers
        Instead of a model: the decoder layers with experts, for example 1-47.
    experts
        Instead of a model: experts per layer.
    source
        Engine that chose the experts, for example vllm.
    engine_version
        Its version.
    dtype
        What it computed in, for example bfloat16.
    weights_sha256
        SHA-256 that identifies the weights it held.
    keep_order
        Keep the experts of a token in the order of the file; by default they are stored by id, which takes less.
    """
    store = RunStore(root_of(root), run_id)
    told = {"source": source, "engine_version": engine_version, "dtype": dtype, "weights_sha256": weights_sha256}
    given = {name: value for name, value in told.items() if value is not None}
    shape = _model_shape(model, layers, experts)
    ref = import_routes(store, iteration, file, shape, ToldOrigin(**given) if given else None, keep_order)
    _tell_import(RouteArchive.open(store.open(ref)), root, json_)


def parse_layers(text: str) -> tuple[int, ...]:
    """Decoder layers of a list such as `0-11,20`, ascending.

    Raises ConfigError for other text, falling ranges, and layers from 65536 on.
    """
    if not _LAYERS.fullmatch(text):
        raise ConfigError(f"layers {text!r} are not decoder layer indices; write them like 0-11,20")
    # Before any range is expanded, or the largest would fill the memory.
    beyond = [n for n in re.findall("[0-9]+", text) if len(n.lstrip("0")) > 5 or int(n) >= _MAX_DECODER_LAYERS]
    if beyond:
        raise ConfigError(f"layers go up to {beyond[0][:20]}; name decoder layers below {_MAX_DECODER_LAYERS}")
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        named = range(int(first), int(last or first) + 1)
        if not named:
            raise ConfigError(f"layers {part} are none, the range falls; write it from its lowest layer to its highest")
        layers |= set(named)
    return tuple(sorted(layers))


def _format_of(file: Path) -> ExportFormat:
    for form in EXPORT_FORMATS:
        if file.suffix == f".{form}":
            return form
    raise ConfigError(
        f"{file} ends with none of {', '.join(f'.{form}' for form in EXPORT_FORMATS)}; name it so, or give --format"
    )


def _model_shape(model: Path | None, layers: str | None, experts: int | None) -> ModelShape | None:
    if model is None:
        if (layers is None) != (experts is None):
            raise ConfigError("--layers and --experts describe a model together; give both, or --model")
        return None if layers is None or experts is None else ModelShape(parse_layers(layers), _checked(experts))
    if layers is not None or experts is not None:
        raise ConfigError("--model tells layers and experts; leave out --layers and --experts, or --model")
    from moe_replay.routing.model_shape import router_shape

    return ModelShape(*router_shape(model))


def _checked(experts: int) -> int:
    try:
        route_dtype(experts)
    except RoutingMismatch as error:
        raise ConfigError(f"--experts: {error}") from error
    return experts


def _tell_import(imported: RouteArchive, root: str | None, as_json: bool) -> None:
    provenance, attributes = imported.provenance, imported.artifact.commit.attributes
    if as_json:
        told = {"run_id": provenance.run_id, "iteration": provenance.iteration, "sequences": imported.num_sequences}
        print(json.dumps({**told, "captured_rows": provenance.captured_rows, **attributes}))
        return
    named = as_argument(provenance.run_id, root)
    _say(
        f"imported {imported.num_sequences:,} sequences of {imported.num_tokens:,} tokens into run "
        f"{provenance.run_id}, iteration {provenance.iteration}: {provenance.captured_rows:,} rows captured, "
        f"{provenance.missing_rows:,} missing, {provenance.padded_rows:,} of padding left out\n"
        f"next:  {command_name()} archive inspect {named}\n"
        f"       {command_name()} archive diff {provenance.run_id} {as_argument('OTHER_RUN', root)}"
    )


def _say(text: str) -> None:
    out.print(escape(text), highlight=False, soft_wrap=True)
