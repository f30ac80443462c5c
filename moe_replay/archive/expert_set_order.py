"""The order of each row's experts, which sorting them lost: digit i is how many ids before the i-th are smaller."""

from math import prod

import numpy as np
import numpy.typing as npt

from moe_replay.archive.byte_streams import StreamReader, StreamWriter
from moe_replay.routing.trace import RouteIds


def add_order(writer: StreamWriter, ids_PK: RouteIds) -> None:
    """Add what `restore_order` needs."""
    # numba takes a second to import, which who only lists runs need not wait for.
    from moe_replay.archive.expert_set_kernels import count_smaller_before

    digits_KP = np.empty(ids_PK.shape[::-1], dtype=np.uint16)
    count_smaller_before(ids_PK, digits_KP)
    for group in _digit_groups(len(digits_KP)):
        numbers_P = digits_KP[group[-1]]
        for i in group[-2::-1]:
            numbers_P = numbers_P * np.uint16(i + 1) + digits_KP[i]
        writer.add_plane(numbers_P, prod(i + 1 for i in group) - 1)


def restore_order(reader: StreamReader, ids_PK: RouteIds) -> None:
    """Reorder sorted rows in place; raises ArchiveCorrupt for what `add_order` can't have written."""
    from moe_replay.archive.expert_set_kernels import reorder_rows

    reorder_rows(ids_PK, _take_digits(reader, *ids_PK.shape))


def _take_digits(reader: StreamReader, num_rows: int, top_k: int) -> npt.NDArray[np.uint16]:
    digits_KP = np.zeros((top_k, num_rows), dtype=np.uint16)
    for group in _digit_groups(top_k):
        numbers_P = reader.take_plane(num_rows, prod(i + 1 for i in group) - 1)
        for i in group:
            numbers_P, digits_KP[i] = np.divmod(numbers_P, np.uint16(i + 1))
    return digits_KP


def _digit_groups(top_k: int) -> list[list[int]]:
    """Digits 1..K-1, of which digit i is one of i + 1: neighbours that fit one byte together."""
    groups: list[list[int]] = []
    size = 257
    for i in range(1, top_k):
        size *= i + 1
        if size > 256:
            groups.append([])
            size = i + 1
        groups[-1].append(i)
    return groups
