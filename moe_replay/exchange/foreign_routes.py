"""Routes that other programs captured, read one sequence at a time and checked against the model's shape.

Two kinds of files, described in `docs/exchange.md`:

    .jsonl         a line a sequence: all its token ids, and its routes as lists (vLLM) or base64 of int32 (SGLang)
    .safetensors   a padded batch as verl holds it: routed_experts [B, S, D, K], input_ids and attention_mask [B, S]

Legend: T tokens of a sequence, R rows captured of it, D layers in the dump, L MoE layers, K experts per token,
B sequences, S tokens of the longest, padding included.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from moe_replay.archive.routes import RoutedSequence, token_digest
from moe_replay.errors import ConfigError, ReplayError, RoutingMismatch
from moe_replay.routing.trace import MIN_TOKENS_TO_JUDGE, RoutingTrace, refuse_dead_capture

_VERL_TENSORS = ("routed_experts", "input_ids", "attention_mask")
_SUFFIXES = (".jsonl", ".safetensors")
_JUDGED_TOKENS = 64 * MIN_TOKENS_TO_JUDGE


class ModelShape(NamedTuple):
    """What must be known of a model to read routes of it."""

    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    num_experts: int
    top_k: int | None = None
    """None: as many as the first sequence names."""
    decoder_layers: int | None = None
    """All layers, dense ones included; None where only MoE layers were told: then the last of these is the last."""


def require_dump(path: Path) -> None:
    """Raise ConfigError unless the file is, by its suffix, of a kind that is read here."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"{path} is neither an export of moe-replay (.parquet, .safetensors or .npz that says so itself) nor a "
            "dump that is read here (.jsonl of vLLM or SGLang, .safetensors of verl); see docs/exchange.md"
        )


def read_foreign_routes(path: Path, model: ModelShape) -> Iterator[RoutedSequence]:
    """The sequences of a file, in its order.

    Raises:
        ConfigError: the file is missing, or of no kind that is read here.
        RoutingMismatch: routes, tokens and model do not belong together, or nothing was captured.
    """
    require_dump(path)
    read = _read_jsonl if path.suffix == ".jsonl" else _read_verl
    try:
        yield from _refusing_dead_capture(read(path, model))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}; check its name") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); give JSON lines"
        ) from error
    except SafetensorError as error:
        raise ConfigError(f"{path} can't be read as safetensors ({error}); write it again") from error


def _refusing_dead_capture(sequences: Iterator[RoutedSequence]) -> Iterator[RoutedSequence]:
    """The sequences, of which the first `_JUDGED_TOKENS` tokens must show that the engine's capture worked."""
    held: list[RoutingTrace] | None = []
    for sequence in sequences:
        if held is not None:
            held.append(sequence.trace)
            if sum(int(trace.valid_T.sum()) for trace in held) >= _JUDGED_TOKENS:
                refuse_dead_capture(held)
                held = None
        yield sequence
    if held:
        refuse_dead_capture(held)


def _read_jsonl(path: Path, model: ModelShape) -> Iterator[RoutedSequence]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                with _located(f"line {number} of {path.name}"):
                    yield _from_line(line, model)


def _from_line(line: str, model: ModelShape) -> RoutedSequence:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RoutingMismatch(f"it is not JSON that can be read ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise RoutingMismatch(f"it holds a {type(row).__name__}; write one object a line")
    required = ("token_ids", "routed_experts")
    missing = [f"has no {name}" for name in required if name not in row]
    missing += [f"has null for {name}" for name in required if name in row and row[name] is None]
    if missing:
        raise RoutingMismatch(
            f"it {' and '.join(missing)} (its fields are {', '.join(sorted(row)[:12])}); "
            "capture must be on in the engine, and token_ids are those of prompt and response"
        )
    ids_T, routes = _integers(row["token_ids"], "token_ids"), row["routed_experts"]
    if ids_T.ndim != 1 or not ids_T.size:
        raise RoutingMismatch(f"token_ids have shape {ids_T.shape}; expected a list of at least one id")
    decoded = _from_base64(routes, len(ids_T), model) if isinstance(routes, str) else None
    captured_RDK = _integers(routes, "routed_experts") if decoded is None else decoded
    return RoutedSequence(_trace(captured_RDK, len(ids_T), model), token_digest(ids_T))


def _from_base64(text: str, num_tokens: int, model: ModelShape) -> npt.NDArray[np.int32]:
    """[R, D, K] of SGLang, whose routes come flat, with a row of K for each decoder layer."""
    if model.decoder_layers is None or model.top_k is None:
        raise ConfigError(
            "routes in base64 come without a shape, which the number of decoder layers and of experts per token gives: "
            "name the folder of the model's config.json with --model"
        )
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise RoutingMismatch(
            f"routed_experts are no base64 of int32 ({error}); they were cut: dump them again"
        ) from error
    per_row = model.decoder_layers * model.top_k
    rows = len(flat) // per_row
    if len(flat) != rows * per_row or rows not in (num_tokens - 1, num_tokens):
        raise RoutingMismatch(
            f"{len(flat)} ids are not those of {num_tokens - 1} or {num_tokens} rows of {model.decoder_layers} layers "
            f"with {model.top_k} experts (a row has {per_row}); tokens, routes and model do not belong together: "
            "token_ids are those of prompt and response, and the model is the one that was served"
        )
    return flat.reshape(rows, model.decoder_layers, model.top_k)


def _read_verl(path: Path, model: ModelShape) -> Iterator[RoutedSequence]:
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        missing = sorted(set(_VERL_TENSORS) - set(names))
        if missing:
            raise ConfigError(
                f"{path} has no tensor {' and no '.join(missing)}; its tensors are {', '.join(names[:12])}: save "
                f"{', '.join(_VERL_TENSORS)} of verl's batch"
            )
        routes, tokens, mask = (file.get_slice(name) for name in _VERL_TENSORS)
        shapes = [tuple(tensor.get_shape()) for tensor in (routes, tokens, mask)]
        if len(shapes[0]) != 4 or {shapes[0][:2]} != set(shapes[1:]):
            raise RoutingMismatch(
                f"{path.name} has routed_experts {shapes[0]}, input_ids {shapes[1]} and attention_mask {shapes[2]}; "
                "expected [B, S, layers, K], [B, S] and [B, S]: save all three of one batch"
            )
        if shapes[0][3] == 1:
            raise RoutingMismatch(
                f"{path.name} has one expert per token, so a row that verl filled with zeros looks like expert 0; give "
                "the engine's own routes as JSON lines"
            )
        for i in range(shapes[0][0]):
            with _located(f"sequence {i} of {path.name}"):
                yield _from_padded(routes[i : i + 1][0], tokens[i : i + 1][0], mask[i : i + 1][0], model)


def _from_padded(
    routes_SDK: npt.NDArray, tokens_S: npt.NDArray, mask_S: npt.NDArray, model: ModelShape
) -> RoutedSequence:
    real_S = mask_S != 0
    if not real_S.any():
        raise RoutingMismatch("its attention_mask is all 0; leave sequences that are padding alone out of the batch")
    padding = routes_SDK[~real_S]
    if padding.any():
        raise RoutingMismatch(
            f"{int(padding.any(axis=(1, 2)).sum())} of its {len(padding)} rows of padding name experts; the "
            "attention_mask does not belong to these routes: save both from one batch"
        )
    captured_TDK = routes_SDK[real_S]
    # verl writes zeros where the engine gave no row: for the last token, and behind the last generation of several.
    named_T = captured_TDK.any(axis=(1, 2))
    rows = int(np.flatnonzero(named_T)[-1]) + 1 if named_T.any() else 0
    if not rows:
        raise RoutingMismatch(
            f"all {len(captured_TDK)} rows are zeros; the rollout ran without route capture: run it again"
        )
    tokens_T = _integers(tokens_S[real_S], "input_ids")
    trace = _with_missing_rows(_trace(captured_TDK[:rows], rows, model), len(tokens_T))
    return RoutedSequence(trace, token_digest(tokens_T), padded_rows=len(padding))


def _trace(captured_RDK: npt.NDArray, num_tokens: int, model: ModelShape) -> RoutingTrace:
    trace = RoutingTrace.from_capture(_moe_layers(captured_RDK, model), num_tokens, model.num_experts, model.layers)
    if model.top_k is not None and trace.top_k != model.top_k:
        raise RoutingMismatch(
            f"its routes name {trace.top_k} experts per token, the model has {model.top_k}; they are of another model"
        )
    return trace


def _with_missing_rows(trace: RoutingTrace, num_tokens: int) -> RoutingTrace:
    """The trace, and rows that are missing up to `num_tokens`."""
    missing = num_tokens - trace.num_tokens
    ids_TLK = np.concatenate([trace.ids_TLK, np.zeros((missing, *trace.ids_TLK.shape[1:]), trace.ids_TLK.dtype)])
    valid_T = np.concatenate([trace.valid_T, np.zeros(missing, dtype=np.bool_)])
    return RoutingTrace(ids_TLK, valid_T, trace.num_experts, trace.layers)


def _moe_layers(captured_RDK: npt.NDArray, model: ModelShape) -> npt.NDArray:
    """The rows of the MoE layers [R, L, K], of a dump of these alone or of all decoder layers."""
    if captured_RDK.ndim != 3:
        raise RoutingMismatch(f"its routes have shape {captured_RDK.shape}; expected [rows, layers, experts per token]")
    found, wanted = captured_RDK.shape[1], len(model.layers)
    if found == wanted:
        return captured_RDK
    decoder_layers = model.decoder_layers or model.layers[-1] + 1
    if found == decoder_layers:
        return captured_RDK[:, list(model.layers)]
    way_out = "" if model.decoder_layers else ", or --layers leaves some out; dense layers above these need --model"
    raise RoutingMismatch(
        f"its routes cover {found} layers; expected the {wanted} MoE layers {model.layers}, or all {decoder_layers} "
        f"decoder layers: the routes are of another model{way_out}"
    )


def _integers(values: Any, name: str) -> npt.NDArray[np.integer]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise RoutingMismatch(f"{name} are lists of unequal lengths; they were cut: dump them again") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise RoutingMismatch(f"{name} are {array.dtype} of shape {array.shape}; expected integers")
    return array


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Errors say where in the file."""
    try:
        yield
    except ReplayError as error:
        raise type(error)(f"{where}: {error}") from error
