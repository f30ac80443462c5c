"""Routes of an archive in one file that other tools read: Parquet, safetensors or npz.

`docs/exchange.md` describes the three. They are written a chunk of tokens at a time. Legend: T tokens of all
sequences, L MoE layers, K experts per token, N sequences.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from moe_replay.archive.provenance import RouteProvenance
from moe_replay.archive.route_writing import DIGEST_BYTES
from moe_replay.archive.routes import RouteArchive
from moe_replay.archive.storage import file_aside, storage_errors
from moe_replay.errors import ConfigError
from moe_replay.routing.trace import RoutingTrace, route_dtype

ExportFormat = Literal["parquet", "safetensors", "npz"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = ("parquet", "safetensors", "npz")
FORMAT = "moe-replay-export"
FORMAT_VERSION = 1
ABOUT_KEY = "moe_replay"
"""Where each format keeps what the export says of itself, as JSON (see `ExportAbout`)."""
CHECKSUM_KEY = "moe_replay_sha256"
"""SHA-256 of that JSON, in safetensors followed by all bytes after the header; the formats have no such checksum."""

PARQUET_SCHEMA = pa.schema(
    {
        "sequence": pa.int64(),
        "token_digest": pa.binary(DIGEST_BYTES),
        "tokens": pa.int32(),
        "routes": pa.large_binary(),
        "valid": pa.binary(),
    }
)
_ROW_GROUP_TOKENS = 65536


class ExportAbout(BaseModel):
    """What an export says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["moe-replay-export"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    provenance: RouteProvenance
    """Of the archive that was exported; its layers are those exported."""


class _Exported(NamedTuple):
    """An archive, and the part of it that is exported."""

    archive: RouteArchive
    layers: tuple[int, ...]
    about: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """[T, L, K]."""
        return self.archive.num_tokens, len(self.layers), self.archive.provenance.top_k

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(route_dtype(self.archive.provenance.num_experts)).newbyteorder("<")

    def chunks(self) -> Iterator[RoutingTrace]:
        """The routes of all tokens, a chunk of the archive at a time."""
        positions = [self.archive.layers.index(layer) for layer in self.layers]
        covering = slice(positions[0], positions[-1] + 1)
        for tokens in self.archive.chunks():
            yield self.archive.read(tokens, covering).select_layers(self.layers)

    def offsets(self) -> npt.NDArray[np.int64]:
        """[N + 1]."""
        parts = self.archive.sequence_tokens(0, self.archive.num_sequences)
        return np.array([0, *(part.stop for part in parts)], dtype="<i8")

    def digests(self) -> npt.NDArray[np.uint8]:
        """[N, DIGEST_BYTES]."""
        return np.frombuffer(b"".join(self.archive.token_digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def export_routes(
    archive: RouteArchive,
    out: Path,
    form: ExportFormat,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the routes of `archive` to the local file `out`, which appears whole or not at all.

    Holds a chunk of tokens, and for Parquet the longest sequence, in memory.

    Args:
        archive: what to export.
        out: the file to write.
        form: its format.
        layers: decoder layers to export; all by default.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: `out` exists or can't be written, or the archive lacks one of `layers`.
        ArchiveCorrupt: what is read is not as committed.
    """
    exported = _Exported(archive, chosen := _chosen(archive, layers), _about(archive, chosen))
    if out.exists() and not (overwrite and out.is_file()):
        raise ConfigError(f"{out} exists already; choose another name, or replace a file with --overwrite")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} to write {out.name} to; make it first")
    with storage_errors(f"writing {out}", creating=True), file_aside(out) as partial:
        _WRITERS[form](exported, partial)
        os.replace(partial, out)


def _chosen(archive: RouteArchive, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return archive.layers
    missing = sorted(set(layers) - set(archive.layers))
    if missing or not layers:
        raise ConfigError(
            f"{archive.artifact.name} has no routes of decoder layers {missing}; it has {archive.layers}: choose among "
            "these"
        )
    return tuple(sorted(set(layers)))


def _about(archive: RouteArchive, layers: tuple[int, ...]) -> str:
    origins = tuple(origin.model_copy(update={"layers": layers}) for origin in archive.provenance.origins)
    return ExportAbout(provenance=archive.provenance.model_copy(update={"origins": origins})).model_dump_json()


def _write_parquet(exported: _Exported, path: Path) -> None:
    schema = PARQUET_SCHEMA.with_metadata(
        {ABOUT_KEY: exported.about, CHECKSUM_KEY: hashlib.sha256(exported.about.encode()).hexdigest()}
    )
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        rows: list[dict] = []
        tokens = 0
        for i, (trace, digest) in enumerate(zip(_sequences(exported), exported.archive.token_digests, strict=True)):
            rows.append(
                {
                    "sequence": i,
                    "token_digest": digest,
                    "tokens": trace.num_tokens,
                    "routes": trace.ids_TLK.astype(exported.dtype, copy=False).tobytes(),
                    "valid": trace.valid_T.tobytes(),
                }
            )
            tokens += trace.num_tokens
            if tokens >= _ROW_GROUP_TOKENS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, tokens = [], 0
        writer.write_table(pa.Table.from_pylist(rows, schema))


def _sequences(exported: _Exported) -> Iterator[RoutingTrace]:
    """One trace a sequence, each chunk of the archive read once."""
    parts = exported.archive.sequence_tokens(0, exported.archive.num_sequences)
    held: RoutingTrace | None = None
    start = done = 0
    for chunk in exported.chunks():
        held = chunk if held is None else RoutingTrace.concatenate([held, chunk])
        while done < len(parts) and parts[done].stop <= start + held.num_tokens:
            yield held.slice_tokens(parts[done].start - start, parts[done].stop - start)
            done += 1
        begun = parts[done].start if done < len(parts) else start + held.num_tokens
        held, start = held.slice_tokens(begun - start, held.num_tokens), begun
    for part in parts[done:]:  # of an archive without any token
        yield exported.archive.read(part).select_layers(exported.layers)


def _write_safetensors(exported: _Exported, path: Path) -> None:
    offsets, digests, num_tokens = exported.offsets(), exported.digests(), exported.shape[0]
    num_bytes = int(np.prod(exported.shape)) * exported.dtype.itemsize
    # Widest first, so that every tensor is aligned.
    tensors = {
        "offsets": ("I64", list(offsets.shape), offsets.nbytes),
        "ids": (f"U{8 * exported.dtype.itemsize}", list(exported.shape), num_bytes),
        "valid": ("BOOL", [num_tokens], num_tokens),
        "token_digests": ("U8", list(digests.shape), digests.nbytes),
    }
    with path.open("xb") as stream:
        checksum_at = _write_safetensors_header(stream, tensors, exported.about)
        sha256, valid = hashlib.sha256(exported.about.encode()), []

        def write(data: bytes) -> None:
            sha256.update(data)
            stream.write(data)

        write(offsets.tobytes())
        for trace in exported.chunks():
            write(trace.ids_TLK.astype(exported.dtype, copy=False).tobytes())
            valid.append(trace.valid_T.tobytes())
        write(b"".join(valid))
        write(digests.tobytes())
        stream.seek(checksum_at)
        stream.write(sha256.hexdigest().encode())


def _write_safetensors_header(stream: BinaryIO, tensors: dict[str, tuple[str, list[int], int]], about: str) -> int:
    """The header, with room for the checksum of what follows; returns where that room is.

    The library's own writer wants all tensors in memory at once.
    """
    room = "0" * 64
    header: dict = {"__metadata__": {ABOUT_KEY: about, CHECKSUM_KEY: room}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    return 8 + text.index(f'"{CHECKSUM_KEY}":"{room}'.encode()) + len(CHECKSUM_KEY) + 4


def _write_npz(exported: _Exported, path: Path) -> None:
    valid = []
    with zipfile.ZipFile(path, "x") as archive:
        with _npz_member(archive, "ids", exported.dtype, exported.shape) as stream:
            for trace in exported.chunks():
                stream.write(trace.ids_TLK.astype(exported.dtype, copy=False).tobytes())
                valid.append(trace.valid_T)
        small = {
            "valid": np.concatenate([np.zeros(0, dtype=np.bool_), *valid]),
            "offsets": exported.offsets(),
            "token_digests": exported.digests(),
            ABOUT_KEY: np.array(exported.about),
        }
        for name, array in small.items():
            with _npz_member(archive, name, array.dtype, array.shape) as stream:
                stream.write(array.tobytes())


def _npz_member(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> BinaryIO:
    stream: BinaryIO = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)  # type: ignore[assignment]
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream


_WRITERS = {"parquet": _write_parquet, "safetensors": _write_safetensors, "npz": _write_npz}
