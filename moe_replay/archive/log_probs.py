"""Log-probs of both engines for each response token, from which any estimate of their mismatch can be made again.

The object `log_probs.parquet` of a training artifact, one row a sequence: `sequence_id`, `rollout` (log μ) and `old`
(log π_old, of the old log-prob pass), natural logarithms at the sampling temperature.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moe_replay.archive.reading import Artifact
from moe_replay.archive.writing import StageWriter
from moe_replay.errors import ArchiveCorrupt

LOG_PROBS_FILE = "log_probs.parquet"

_SCHEMA = pa.schema(
    {"sequence_id": pa.int64(), "rollout": pa.list_(pa.float32()), "old": pa.list_(pa.float32())},
)


class LogProbs(NamedTuple):
    """Those of all response tokens of a batch, one sequence after the other."""

    rollout_T: npt.NDArray[np.float32]
    old_T: npt.NDArray[np.float32]


def write_log_probs(
    writer: StageWriter,
    sequence_ids: Sequence[int],
    rollout: Sequence[npt.NDArray[np.float32]],
    old: Sequence[npt.NDArray[np.float32]],
) -> None:
    """Write the log-probs of each sequence's response tokens."""
    table = pa.table({"sequence_id": list(sequence_ids), "rollout": list(rollout), "old": list(old)}, _SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    writer.write_bytes(LOG_PROBS_FILE, buffer.getvalue())


def read_log_probs(artifact: Artifact) -> LogProbs:
    """The log-probs of a training artifact.

    Raises ArchiveCorrupt unless the object is as committed and has both for the same tokens, ConfigError when
    retention removed it.
    """
    table = pq.read_table(io.BytesIO(artifact.read_bytes(LOG_PROBS_FILE)), schema=_SCHEMA)
    rollout_T, old_T = (table[name].combine_chunks().flatten().to_numpy() for name in ("rollout", "old"))
    if len(rollout_T) != len(old_T):
        raise ArchiveCorrupt(
            f"{artifact.name}/{LOG_PROBS_FILE} has {len(rollout_T)} log-probs of the rollout and {len(old_T)} of the "
            "trainer, which are of the same tokens; restore it, or delete the stage's folder and resume the run"
        )
    return LogProbs(rollout_T, old_T)
