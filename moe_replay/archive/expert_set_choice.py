"""Which mode a chunk's rows are coded in: the one of least cost, bytes and the time they take both counted."""

from moe_replay.archive.byte_streams import StreamWriter
from moe_replay.archive.expert_set_modes import GAPS, PLAIN, RANKS, RELABEL_EVERY, RELATED, add_rows, possible_modes
from moe_replay.archive.sorted_columns import Columns

_PRICES = {RANKS: 1.0, PLAIN: 1.0, GAPS: 1.1, RELATED: 1.25}
"""Cost of a byte in each mode; docs/expert-set-codec.md tells why."""
_REPETITIVE = 0.5
"""Where zstd finds so many rows again that they take less than half their ranks, the slower modes are not tried."""
_SAMPLE_ROWS = 2048
"""At least; where it takes more of them to label experts by popularity, as many as that."""


def add_rows_cheaply(writer: StreamWriter, sorted_KP: Columns, num_experts: int) -> int:
    """Add sorted rows in the mode that is the cheapest for the first of them; that mode."""
    top_k, num_rows = sorted_KP.shape
    sample_rows = max(_SAMPLE_ROWS, -(-RELABEL_EVERY * num_experts // top_k))
    tried = {}
    for mode in possible_modes(num_experts, top_k):
        tried[mode] = StreamWriter()
        add_rows(tried[mode], mode, sorted_KP[:, :sample_rows], num_experts)
        if mode == PLAIN and RANKS in tried and tried[PLAIN].num_bytes < _REPETITIVE * tried[RANKS].num_bytes:
            break
    cheapest = min(tried, key=lambda mode: _PRICES[mode] * tried[mode].num_bytes)
    if num_rows <= sample_rows:
        writer.extend(tried[cheapest])
    else:
        add_rows(writer, cheapest, sorted_KP, num_experts)
    return cheapest
