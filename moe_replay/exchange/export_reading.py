"""Reading back what `exporting` wrote, checked: the file came from elsewhere, and nothing in it is trusted.

No format here can hold code: npz members are read as plain arrays, pickled ones are refused.
Legend: T tokens of all sequences, L MoE layers, K experts per token, N sequences.
"""

import hashlib
import struct
import tokenize
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from moe_replay.archive.provenance import RouteOrigin, RouteProvenance
from moe_replay.archive.route_writing import DIGEST_BYTES
from moe_replay.archive.routes import RoutedSequence
from moe_replay.errors import ArchiveCorrupt, ConfigError, ReplayError, RoutingMismatch
from moe_replay.exchange.exporting import ABOUT_KEY, CHECKSUM_KEY, PARQUET_SCHEMA, ExportAbout
from moe_replay.routing.trace import RoutingTrace, check_layers, route_dtype

_BATCH_ROWS = 16
_BLOCK = 8 * 2**20
# The last three come from Python's parser, to which numpy gives headers.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, struct.error, zlib.error, zipfile.BadZipFile)
_UNREADABLE += (NotImplementedError, SafetensorError, pa.ArrowException, tokenize.TokenError, SyntaxError, TypeError)


class Export(NamedTuple):
    """An export, opened."""

    provenance: RouteProvenance
    """Of the archive that was exported."""
    sequences: Iterator[RoutedSequence]
    """Read from the file as they are asked for; raises when the file is not what it says it is."""


def open_export(path: Path) -> Export | None:
    """The export in a file by its suffix and by what it says of itself; None where it says nothing of an export.

    Raises:
        ConfigError: it can't be read as what its suffix says, so that nothing tells whether it ever was an export.
        ArchiveCorrupt: it says that it is an export, and breaks the format.
    """
    readers = {
        ".parquet": (_is_parquet_export, _open_parquet),
        ".safetensors": (_is_safetensors_export, _open_safetensors),
        ".npz": (_is_npz_export, _open_npz),
    }
    if path.suffix not in readers:
        return None
    is_export, opened = readers[path.suffix]
    with _readable(path, _neither):
        if not is_export(path):
            return None
    with _readable(path, _broken):
        return opened(path)


def _is_parquet_export(path: Path) -> bool:
    return ABOUT_KEY.encode() in (pq.read_schema(path).metadata or {})


def _open_parquet(path: Path) -> Export:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    metadata = file.schema_arrow.metadata
    about = metadata[ABOUT_KEY.encode()]
    _check_sum(path, hashlib.sha256(about).hexdigest(), metadata.get(CHECKSUM_KEY.encode(), b"").decode())
    if not file.schema_arrow.equals(PARQUET_SCHEMA):
        raise _broken(path, f"its columns are {file.schema_arrow.names}, expected {PARQUET_SCHEMA.names}")
    provenance = _provenance(path, about)
    return Export(provenance, _parquet_sequences(path, file, provenance))


def _parquet_sequences(path: Path, file: pq.ParquetFile, provenance: RouteProvenance) -> Iterator[RoutedSequence]:
    start = 0
    dtype, per_token = _layout(provenance)
    with _readable(path, _broken), file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                tokens, routes, valid = row["tokens"], row["routes"], row["valid"]
                if None in row.values() or len(valid) != tokens or len(routes) != tokens * per_token * dtype.itemsize:
                    sizes = [None if cell is None else len(cell) for cell in (routes, valid)]
                    raise _broken(path, f"sequence {row['sequence']} of {tokens} tokens has {sizes} bytes of routes")
                ids = np.frombuffer(routes, dtype=dtype)
                yield _sequence(provenance, start, ids, np.frombuffer(valid, dtype=np.uint8), row["token_digest"])
                start += tokens
    _require_tokens(path, provenance, start)


def _is_safetensors_export(path: Path) -> bool:
    with safe_open(path, framework="np") as file:
        return ABOUT_KEY in (file.metadata() or {})


def _open_safetensors(path: Path) -> Export:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        about = metadata[ABOUT_KEY].encode()
        _check_sum(path, _data_sha256(path, about), metadata.get(CHECKSUM_KEY, ""))
        provenance = _provenance(path, about)
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it has keys and is no mapping
        shapes = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in found.items()}
        ids_dtype = f"U{8 * _layout(provenance)[0].itemsize}"
        _check_shapes(path, shapes, provenance, {"ids": ids_dtype, "valid": "BOOL", "offsets": "I64"}, "U8")
        small = {name: file.get_tensor(name) for name in ("offsets", "token_digests", "valid")}
    return Export(provenance, _safetensors_sequences(path, provenance, small))


def _safetensors_sequences(
    path: Path, provenance: RouteProvenance, small: dict[str, npt.NDArray]
) -> Iterator[RoutedSequence]:
    with _readable(path, _broken), safe_open(path, framework="np") as file:
        ids_TLK = file.get_slice("ids")
        for i, (start, stop) in enumerate(_ranges(path, small["offsets"], provenance)):
            # The library refuses an empty slice at the end of a tensor.
            ids = ids_TLK[start:stop].reshape(-1) if start < stop else np.zeros(0, dtype=_layout(provenance)[0])
            digest = small["token_digests"][i].tobytes()
            yield _sequence(provenance, start, ids, small["valid"][start:stop].view(np.uint8), digest)


def _data_sha256(path: Path, about: bytes) -> str:
    """Of what the file says of itself and of all bytes after the header."""
    sha256 = hashlib.sha256(about)
    with path.open("rb") as stream:
        stream.seek(8 + struct.unpack("<Q", stream.read(8))[0])
        while block := stream.read(_BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def _check_sum(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise _broken(path, f"its content has sha256 {found}, it says {expected[:64]}")


def _is_npz_export(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return f"{ABOUT_KEY}.npy" in archive.namelist()


def _open_npz(path: Path) -> Export:
    with zipfile.ZipFile(path) as archive:
        about = _npz_array(path, archive, ABOUT_KEY)
        if about.shape != () or about.dtype.kind != "U":
            raise _broken(path, f"{ABOUT_KEY}.npy holds {about.dtype} of shape {about.shape}, expected one text")
        provenance = _provenance(path, about.item().encode())
        headers = {}
        for name in ("ids", "valid", "offsets", "token_digests"):
            with archive.open(f"{name}.npy") as stream:
                headers[name] = _npz_header(path, stream, name)
        names = {"ids": str(_layout(provenance)[0]), "valid": "bool", "offsets": "int64"}
        shapes = {name: (str(dtype), shape) for name, (dtype, shape) in headers.items()}
        _check_shapes(path, shapes, provenance, names, "uint8")
        small = {name: _npz_array(path, archive, name) for name in ("valid", "offsets", "token_digests")}
    return Export(provenance, _npz_sequences(path, provenance, small))


def _npz_sequences(path: Path, provenance: RouteProvenance, small: dict[str, npt.NDArray]) -> Iterator[RoutedSequence]:
    dtype, per_token = _layout(provenance)
    with _readable(path, _broken), zipfile.ZipFile(path) as archive, archive.open("ids.npy") as stream:
        _npz_header(path, stream, "ids")
        for i, (start, stop) in enumerate(_ranges(path, small["offsets"], provenance)):
            data = stream.read((stop - start) * per_token * dtype.itemsize)
            if len(data) != (stop - start) * per_token * dtype.itemsize:
                raise _broken(path, f"ids.npy ends within sequence {i}")
            digest = small["token_digests"][i].tobytes()
            ids = np.frombuffer(data, dtype=dtype)
            yield _sequence(provenance, start, ids, small["valid"][start:stop].view(np.uint8), digest)
        if stream.read(1):  # also has zipfile check the member's checksum
            raise _broken(path, "ids.npy goes on behind the last sequence")


def _npz_header(path: Path, stream: IO[bytes], name: str) -> tuple[np.dtype, tuple[int, ...]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise _broken(path, f"{name}.npy is of npy version {version}, expected one of {list(readers)}")
    try:
        shape, fortran_order, dtype = readers[version](stream)
    except (RecursionError, MemoryError) as error:
        # Python's parser; numpy gives it no more than 10 000 characters.
        raise _broken(path, f"{name}.npy has a header that is nested too deeply") from error
    if dtype.hasobject or fortran_order:
        raise _broken(
            path, f"{name}.npy holds {dtype} in {'Fortran' if fortran_order else 'C'} order, not plain numbers"
        )
    return dtype, shape


def _npz_array(path: Path, archive: zipfile.ZipFile, name: str) -> npt.NDArray:
    with archive.open(f"{name}.npy") as stream:
        _npz_header(path, stream, name)
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_shapes(
    path: Path,
    found: dict[str, tuple[str, tuple[int, ...]]],
    provenance: RouteProvenance,
    dtypes: dict[str, str],
    byte: str,
) -> None:
    """Of the four arrays of a flat format; sequences are as many as there are digests."""
    num_sequences = found.get("token_digests", ("", (0,)))[1][0]
    shapes = {
        "ids": (provenance.tokens, len(provenance.layers), provenance.top_k),
        "valid": (provenance.tokens,),
        "offsets": (num_sequences + 1,),
        "token_digests": (num_sequences, DIGEST_BYTES),
    }
    expected = {name: (dtypes.get(name, byte), shape) for name, shape in shapes.items()}
    if found != expected:
        raise _broken(path, f"it holds {found}, expected {expected}")


def _ranges(path: Path, offsets: npt.NDArray[np.int64], provenance: RouteProvenance) -> Iterator[tuple[int, int]]:
    if offsets[0] != 0 or offsets[-1] != provenance.tokens or (np.diff(offsets) < 0).any():
        raise _broken(path, f"offsets must rise from 0 to {provenance.tokens}; they go {offsets[0]} to {offsets[-1]}")
    return pairwise(offsets.tolist())


def _sequence(
    provenance: RouteProvenance, start: int, ids: npt.NDArray, valid: npt.NDArray[np.uint8], digest: bytes
) -> RoutedSequence:
    """The sequence that begins at token `start` of the export; the trace checks its routes."""
    if (valid > 1).any():
        raise RoutingMismatch(f"validity is 0 or 1, found {valid.max()}; the export is damaged: make it again")
    ids_TLK = ids.reshape(len(valid), len(provenance.layers), provenance.top_k)
    dtype = route_dtype(provenance.num_experts)
    trace = RoutingTrace(ids_TLK.astype(dtype), valid.astype(np.bool_), provenance.num_experts, provenance.layers)
    origins, padded = _origins(provenance, start, start + len(valid))
    return RoutedSequence(trace, digest, origins, padded)


def _origins(provenance: RouteProvenance, start: int, stop: int) -> tuple[tuple[tuple[int, RouteOrigin], ...], int]:
    """Where the origin changes within tokens start..stop-1, and the padding of row groups that end there."""
    changes: list[tuple[int, RouteOrigin]] = []
    padded = 0
    groups = provenance.row_groups
    first = max(bisect_right(groups, start, key=lambda group: group.first_token) - 1, 0)
    for group in takewhile(lambda group: group.first_token < stop, groups[first:] if start < stop else ()):
        origin = provenance.origins[group.origin]
        if not changes or changes[-1][1] != origin:
            changes.append((max(group.first_token - start, 0), origin))
        if group.first_token + group.tokens <= stop:
            padded += group.padded_rows
    return tuple(changes), padded


def _layout(provenance: RouteProvenance) -> tuple[np.dtype, int]:
    """The dtype of ids in a file, and how many there are per token."""
    dtype = np.dtype(route_dtype(provenance.num_experts)).newbyteorder("<")
    return dtype, len(provenance.layers) * provenance.top_k


def _provenance(path: Path, about: bytes) -> RouteProvenance:
    try:
        provenance = ExportAbout.model_validate_json(about).provenance
        check_layers(provenance.layers)
    except (ValidationError, RoutingMismatch) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise _broken(path, f"what it says of itself breaks the format ({reason})") from error
    return provenance


def _require_tokens(path: Path, provenance: RouteProvenance, found: int) -> None:
    if found != provenance.tokens:
        raise _broken(path, f"it holds {found} tokens, its provenance says {provenance.tokens}")


@contextmanager
def _readable(path: Path, error_of: Callable[[Path, str], ReplayError]) -> Iterator[None]:
    """What libraries raise for a file that is damaged or no such file, as one of our errors."""
    try:
        yield
    except ReplayError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}; check its name") from error
    except _UNREADABLE as error:
        raise error_of(path, f"it can't be read as {path.suffix[1:]} ({type(error).__name__}: {error})") from error


def _neither(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} is neither an export nor a dump that can be imported: {what}; check its name, and if it was one and "
        "was cut, export or copy it again"
    )


def _broken(path: Path, what: str) -> ArchiveCorrupt:
    return ArchiveCorrupt(f"the export {path} is not what it should be: {what}; export it again, or copy it again")
