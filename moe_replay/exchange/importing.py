"""Import of routes from a file into a run folder of their own, where everything that reads an archive works on them."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.layout import IMPORTS_KEY
from moe_replay.archive.provenance import RouteOrigin, RouteProvenance
from moe_replay.archive.routes import RoutedSequence, write_routes
from moe_replay.errors import ArchiveCorrupt, ConfigError, ReplayError
from moe_replay.exchange.export_reading import open_export
from moe_replay.exchange.foreign_routes import ModelShape, read_foreign_routes, require_dump

UNKNOWN = "unknown"


@dataclass(frozen=True)
class ToldOrigin:
    """What the user says of routes whose file does not."""

    source: str = UNKNOWN
    """Which engine, e.g. `vllm` or `sglang`."""
    engine_version: str = UNKNOWN
    dtype: str = UNKNOWN
    """What the engine computed in."""
    weights_sha256: str | None = None


@dataclass(frozen=True)
class _Source:
    """What a file holds, however it is written."""

    sequences: Iterable[RoutedSequence]
    origin: RouteOrigin
    """Of every sequence that names no other."""
    keep_order: bool
    exported: RouteProvenance | None
    """Where the file is an export: of the archive that was exported."""


def import_routes(
    store: RunStore,
    iteration: int,
    file: Path,
    model: ModelShape | None = None,
    told: ToldOrigin | None = None,
    keep_order: bool = False,
) -> ArtifactRef:
    """Write the routes in `file` as the routing archive of an iteration, and commit it.

    The run is made when there is none of that id; it holds imported routes of one model alone. Nothing of it is
    visible before the whole file was found sound.

    Args:
        store: the run to import into.
        iteration: whose archive the routes become.
        file: an export, or a dump as in `foreign_routes`.
        model: what a dump is of; an export knows itself.
        told: where a dump comes from; an export knows itself.
        keep_order: keep the experts of a row in the dump's order; an export keeps what it has.

    Raises:
        ConfigError: the file or the options can't be used, the run is another's, or the iteration has routes.
        RoutingMismatch: routes, tokens and model do not belong together.
        ArchiveCorrupt: an export is damaged.
    """
    sha256 = _digest(file)
    source = _open(file, model, told, keep_order)
    document = {
        IMPORTS_KEY: {
            "num_experts": source.origin.num_experts,
            "top_k": source.origin.top_k,
            "layers": list(source.origin.layers),
        }
    }
    if store.exists():
        _require_imports(store)
        store.create_run(document)
    writer = store.begin("routes", iteration, {}, config_digest=sha256)
    try:
        provenance = write_routes(writer, source.sequences, source.origin, keep_order=source.keep_order)
        if source.exported is not None:
            _require_same_counts(file, source.exported, provenance)
        # Only now, so that a file that is refused leaves no run behind.
        store.create_run(document)
    except BaseException:
        # What went wrong first is what is told; `archive gc` finds what could not be removed.
        with suppress(ReplayError):
            writer.discard()
        raise
    return writer.commit(attributes={**_note(file, sha256, source), **_counts(provenance)})


def _require_imports(store: RunStore) -> None:
    if IMPORTS_KEY not in store.read_run():
        raise ConfigError(f"run {store.run_id} is a run that trains; import into a new run id")


def _open(file: Path, model: ModelShape | None, told: ToldOrigin | None, keep_order: bool) -> _Source:
    export = open_export(file)
    if export is None:
        return _open_dump(file, model, told or ToldOrigin(), keep_order)
    if model is not None or told is not None:
        raise ConfigError(
            f"{file} is an export of run {export.provenance.run_id} and says itself what it holds; leave out the "
            "options on the model and on where routes come from"
        )
    kept = export.provenance.order == "engine"
    return _Source(export.sequences, export.provenance.origins[0], kept, export.provenance)


def _open_dump(file: Path, model: ModelShape | None, told: ToldOrigin, keep_order: bool) -> _Source:
    require_dump(file)
    if model is None:
        raise ConfigError(
            f"{file} does not say which layers its routes are of and of how many experts; name the folder of the "
            "model's config.json with --model, or give --layers and --experts"
        )
    sequences = read_foreign_routes(file, model)
    first = next(sequences, None)
    if first is None:
        raise ConfigError(f"{file} holds no sequence; there is nothing to import")
    shape = {"layers": model.layers, "num_experts": model.num_experts, "top_k": first.trace.top_k}
    try:
        origin = RouteOrigin(**asdict(told), **shape)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}; give it so, or leave it out") from error
    return _Source(chain([first], sequences), origin, keep_order, None)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} can't be read ({error.strerror}); check its name and permissions") from error


def _require_same_counts(file: Path, exported: RouteProvenance, found: RouteProvenance) -> None:
    counts = [(p.captured_rows, p.missing_rows, p.padded_rows) for p in (exported, found)]
    if counts[0] != counts[1]:
        raise ArchiveCorrupt(
            f"the export {file} is not what it should be: it says (captured, missing, padded) rows = {counts[0]}, its "
            f"routes have {counts[1]}; export it again, or copy it again"
        )


def _note(file: Path, sha256: str, source: _Source) -> dict[str, str | int]:
    """What the commit says of the import; of the file its name alone, since paths are private."""
    note: dict[str, str | int] = {"imported_file": file.name, "imported_sha256": sha256}
    if source.exported is not None:
        note |= {"exported_run_id": source.exported.run_id, "exported_iteration": source.exported.iteration}
    return note


def _counts(provenance: RouteProvenance) -> dict[str, int]:
    return {
        "tokens": provenance.tokens,
        "missing_rows": provenance.missing_rows,
        "padded_rows": provenance.padded_rows,
    }
