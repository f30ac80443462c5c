"""Prompts from any Parquet file in verl's schema, and which of them each iteration trains on.

The schema is that of verl's own data preparation scripts (`verl/examples/data_preprocess`): `prompt` is a list of
chat messages, `data_source` names the scorer, `reward_model.ground_truth` is what the scorer compares with,
`extra_info` is free.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from moe_replay.errors import ConfigError
from moe_replay.seeds import derive_seed

pc: Any = pyarrow.compute  # its functions are made at import, where no type checker sees them

REQUIRED = {
    "prompt": "list<struct<role: string, content: string>>",
    "data_source": "string",
    "reward_model": "struct<ground_truth: any>",
}
"""The columns every file needs and the kind of each; `extra_info` (struct or JSON string) is optional."""


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file; `ground_truth` is whatever the scorer of `data_source` expects."""

    row: int
    messages: list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class PromptTable:
    """A checked prompt file in memory; `digest` is the sha256 of its bytes."""

    path: Path
    digest: str
    _table: pa.Table

    @classmethod
    def open(cls, path: str | Path) -> "PromptTable":
        """Read and check a whole file.

        Raises ConfigError when it is absent, no Parquet file, empty, or not of the schema.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"there is no Parquet file at {path}; give the path of one in verl's schema")
        try:
            schema = pq.read_schema(path)
            _require_columns(path, schema)
            columns = [name for name in (*REQUIRED, "extra_info") if name in schema.names]
            table = pq.ParquetFile(path).read(columns=columns)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} can't be read as Parquet ({error}); write it again") from error
        _require_values(path, table)
        return cls(path=path, digest=digest, _table=table)

    def __len__(self) -> int:
        return self._table.num_rows

    def draw(self, iteration: int, count: int, seed: int) -> list[Prompt]:
        """The `count` prompts of an iteration (counted from 0), a pure function of the arguments and the file.

        Iterations read on through epochs, each a permutation of its own of all rows, so that a resumed run needs
        no state to go on where it stopped.
        """
        return self.read_on(iteration * count, count, seed)

    def read_on(self, first: int, count: int, seed: int) -> list[Prompt]:
        """The `count` prompts from number `first` on of that endless order, as `draw` takes them from it."""
        rows: list[int] = []
        while len(rows) < count:
            epoch, offset = divmod(first + len(rows), len(self))
            rows += _epoch_order(len(self), seed, epoch)[offset : offset + count - len(rows)].tolist()
        return self.at(rows)

    def take(self, count: int) -> list[Prompt]:
        """The first `count` prompts in file order, or all where there are fewer."""
        return self.at(list(range(min(count, len(self)))))

    def rows(self) -> Iterator[Prompt]:
        """All prompts in file order."""
        for start in range(0, len(self), 1024):
            yield from self.at(list(range(start, min(start + 1024, len(self)))))

    def data_sources(self) -> set[str]:
        """The distinct `data_source` values, for `rewards.require_known_sources`."""
        return set(pc.unique(self._table.column("data_source")).to_pylist())

    def at(self, rows: Sequence[int]) -> list[Prompt]:
        """The prompts in these rows, in this order."""
        records = self._table.take(pa.array(rows, pa.int64())).to_pylist()
        return [
            Prompt(
                row=row,
                messages=[{"role": message["role"], "content": message["content"]} for message in record["prompt"]],
                data_source=record["data_source"],
                ground_truth=record["reward_model"]["ground_truth"],
                extra_info=_extra_info(self.path, row, record.get("extra_info")),
            )
            for row, record in zip(rows, records, strict=True)
        ]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write at least one prompt in verl's schema, in the order given (`row` is not stored); whole or not at all.

    Raises ConfigError when the folder is missing or can't be written.
    """
    records = [
        {
            "prompt": prompt.messages,
            "data_source": prompt.data_source,
            "reward_model": {"style": "rule", "ground_truth": prompt.ground_truth},
            "extra_info": prompt.extra_info,
        }
        for prompt in prompts
    ]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(pa.Table.from_pylist(records), partial)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"can't write {path} ({error}); give a path in a folder that can be written") from error
    finally:
        partial.unlink(missing_ok=True)


def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of all rows in an epoch.

    Sorted raw output of PCG64: NumPy keeps a bit generator's stream the same for ever, `permutation`'s it doesn't.
    """
    keys = np.random.PCG64(derive_seed(seed, "prompts", epoch)).random_raw(size)
    return np.argsort(keys, kind="stable")


def _require_columns(path: Path, schema: pa.Schema) -> None:
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)} of verl's schema; its columns are {', '.join(schema.names) or 'none'}. "
            + _SCHEMA_HINT
        )
    kinds = {
        "prompt": _is_messages,
        "data_source": _is_text,
        "reward_model": lambda kind: pa.types.is_struct(kind) and kind.get_field_index("ground_truth") >= 0,
        "extra_info": lambda kind: pa.types.is_struct(kind) or pa.types.is_null(kind) or _is_text(kind),
    }
    for name, is_right in kinds.items():
        if name in schema.names and not is_right(schema.field(name).type):
            raise ConfigError(f"column {name} of {path} is {schema.field(name).type}. {_SCHEMA_HINT}")


def _require_values(path: Path, table: pa.Table) -> None:
    """Nothing a row needs is absent; whether scorers accept a missing ground truth is theirs to say."""
    if table.num_rows == 0:
        raise ConfigError(f"{path} has no rows; a run needs at least one prompt")
    for name in REQUIRED:
        if absent := table.column(name).null_count:
            raise ConfigError(f"{absent} of {table.num_rows} rows of {path} have no {name}; drop or fill them")
    shortest = pc.min(pc.list_value_length(table.column("prompt"))).as_py()
    messages = pc.list_flatten(table.column("prompt"))
    incomplete = sum(pc.sum(pc.is_null(pc.struct_field(messages, part))).as_py() or 0 for part in ("role", "content"))
    if shortest == 0 or incomplete:
        raise ConfigError(
            f"{path} has prompts without messages, or messages without role or content ({incomplete} nulls); "
            "every prompt needs at least one message with both"
        )
    if "extra_info" in table.column_names and _is_text(table.schema.field("extra_info").type):
        for row, text in enumerate(table.column("extra_info").to_pylist()):
            _extra_info(path, row, text)


def _extra_info(path: Path, row: int, value: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"extra_info in row {row} of {path} is text but not JSON ({error})") from error
        if not isinstance(value, dict | None):
            raise ConfigError(f"extra_info in row {row} of {path} is JSON but no object: {str(value)[:80]}")
    return value or {}


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    parts = {field.name: field.type for field in kind.value_type.fields}
    return all(name in parts and _is_text(parts[name]) for name in ("role", "content"))


_SCHEMA_HINT = (
    "Each row needs "
    + ", ".join(f"{name}: {kind}" for name, kind in REQUIRED.items())
    + ", and may have extra_info: struct or JSON string; rename, convert or add columns."
)
