"""Sets of experts as bytes: rows of K distinct ids below E, each at about log2 of how unlikely it is, not K bytes.

The format is told in docs/expert-set-codec.md. Legend, here and in the other `expert_set_*` modules: R rows, P of them
present (not missing), K experts per row, E experts.
"""

import struct
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from moe_replay.archive.byte_streams import WAY_OUT, StreamReader, StreamWriter
from moe_replay.archive.expert_set_choice import add_rows_cheaply
from moe_replay.archive.expert_set_modes import possible_modes, take_rows
from moe_replay.archive.expert_set_order import add_order, restore_order
from moe_replay.archive.sorted_columns import Columns, sorted_columns
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import RouteIds, route_dtype

_HEADER = struct.Struct("<BBIIII")
_KEEPS_ORDER = 1


def encode_sets(ids_RK: RouteIds, num_experts: int, keep_order: bool = False) -> bytes:
    """The bytes of R rows of K ids; rows of zeros (with K >= 2) are missing and come back as such.

    Raises RoutingMismatch for a row that names an expert twice or one >= `num_experts`.
    """
    num_rows, top_k = ids_RK.shape
    sorted_KP = sorted_columns(ids_RK.T)
    writer = StreamWriter()
    present_R = sorted_KP[-1] > 0 if top_k > 1 else np.ones(num_rows, dtype=bool)
    if not present_R.all():
        sorted_KP = sorted_KP.take(np.flatnonzero(present_R), axis=1)
        writer.add(np.packbits(~present_R, bitorder="little"))
    _require_sets(sorted_KP, present_R, num_experts)
    mode = add_rows_cheaply(writer, sorted_KP, num_experts)
    if keep_order:
        add_order(writer, ids_RK[present_R])
    num_present = sorted_KP.shape[1]
    return _HEADER.pack(mode, keep_order, num_experts, top_k, num_rows, num_present) + writer.to_bytes()


def decode_sets(
    data: bytes | memoryview, shape: tuple[int, int], num_experts: int, keep_order: bool = False
) -> RouteIds:
    """The rows that `encode_sets` was given, each sorted ascending unless `keep_order`.

    Raises ArchiveCorrupt for bytes it can't have written, or wrote for another shape, `num_experts` or `keep_order`.
    """
    num_rows, top_k = shape
    mode, num_present = _read_header(data, shape, num_experts, keep_order)
    reader = StreamReader(memoryview(data)[_HEADER.size :])
    present_R = _take_present(reader, num_rows, num_present) if num_present < num_rows else None
    ids_PK = np.ascontiguousarray(take_rows(reader, mode, (top_k, num_present), num_experts).T)
    if keep_order:
        restore_order(reader, ids_PK)
    reader.finish()
    if present_R is None:
        return ids_PK
    ids_RK = np.zeros(shape, dtype=route_dtype(num_experts))
    ids_RK[present_R] = ids_PK
    return ids_RK


def _read_header(
    data: bytes | memoryview, shape: tuple[int, int], num_experts: int, keep_order: bool
) -> tuple[int, int]:
    """Mode, and number of rows that are present."""
    if len(data) < _HEADER.size:
        raise ArchiveCorrupt(f"coded rows of {len(data)} bytes lack a header of {_HEADER.size}; {WAY_OUT}")
    mode, flags, experts, top_k, num_rows, num_present = _HEADER.unpack_from(data)
    found = (num_rows, top_k, experts, bool(flags & _KEEPS_ORDER))
    if found != (*shape, num_experts, keep_order):
        raise ArchiveCorrupt(
            f"coded rows are (rows, top_k, experts, order kept) = {found}, expected {(*shape, num_experts, keep_order)}"
            f"; they are another array's, or {WAY_OUT}"
        )
    known_mode = mode in possible_modes(experts, top_k)
    known_flags = not flags & ~_KEEPS_ORDER
    rows_fit = num_present == num_rows or (num_present < num_rows and top_k > 1)
    if not (known_mode and known_flags and rows_fit):
        raise ArchiveCorrupt(
            f"coded rows have mode {mode}, flags {flags}, {num_present} of {num_rows} rows present; {WAY_OUT}"
        )
    return mode, num_present


def _take_present(reader: StreamReader, num_rows: int, num_present: int) -> npt.NDArray[np.bool_]:
    missing = np.unpackbits(reader.take((num_rows + 7) // 8), bitorder="little")
    if num_rows - int(missing.sum()) != num_present or missing[num_rows:].any():
        raise ArchiveCorrupt(f"{missing.sum()} of {num_rows} rows are missing, but {num_present} present; {WAY_OUT}")
    return missing[:num_rows] == 0


def _require_sets(sorted_KP: Columns, present_R: npt.NDArray[np.bool_], num_experts: int) -> None:
    wrong_P = sorted_KP[-1].astype(np.uint32) >= num_experts
    for below_P, above_P in pairwise(sorted_KP):
        wrong_P |= below_P == above_P
    if wrong_P.any():
        position = int(wrong_P.argmax())
        row = int(np.flatnonzero(present_R)[position])
        raise RoutingMismatch(
            f"row {row} names experts {sorted_KP[:, position].tolist()}, no set of {num_experts} experts: ids count "
            "from 0 and a row names each once; the routes are of another model or the capture is damaged"
        )
