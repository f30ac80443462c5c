"""`moe-replay plan`: what routes, router evolution and predictors of a model would take, before anything is run."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from moe_replay.analysis.sizing import EvolutionSizing, Sizing, Workload, size_iteration
from moe_replay.cli.console import Json, command_name, out
from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, parse_as
from moe_replay.dotted import dotted
from moe_replay.errors import ConfigError
from moe_replay.places import is_hub_name
from moe_replay.routing.declared import declared_routers

_DEFAULT_TOKENS = "16K,32K,64K,128K"
_KEYS = {
    "mini_steps": "training.mini_steps",
    "codec": "storage.codec",
    "keep_order": "storage.keep_order",
    "chunk_tokens": "storage.chunk_tokens",
    "evolution_tokens": "evolution.tokens",
    "evolution_dtype": "evolution.dtype",
}
"""Of what is planned with and set alike, the config's keys."""


def plan(
    model: str,
    *,
    config: Path | None = None,
    sequences: int | None = None,
    tokens: str | None = None,
    mini_steps: int | None = None,
    codec: Literal["expert-set", "zstd", "raw"] | None = None,
    keep_order: Annotated[bool | None, Parameter(negative="")] = None,
    chunk_tokens: int | None = None,
    evolution_tokens: int | None = None,
    evolution_dtype: Literal["bfloat16", "float32"] | None = None,
    network_mb_s: float | None = None,
    json_: Json = False,
) -> None:
    """Size a model's routing replay: bytes, objects, memory and time of an iteration, from its config.json alone.

    Counts of bytes and objects follow from the formats and are exact. Compressed sizes and times scale from
    measurements on two shared CPU cores (docs/benchmarks.md) and are marked as such.

    Parameters
    ----------
    model
        The config.json of a Hugging Face Mixture-of-Experts model, the folder it lies in, or the hub name of one whose
        config is in the Hugging Face cache of this machine; nothing is fetched.
    config
        A run's TOML file, to take from it what is not given: batch, longest sequence, evolution, archive settings; and
        what its partial rollouts carry from one iteration to the next.
    sequences
        Of an iteration, prompts × responses; by default 512.
    tokens
        Of a sequence, prompt and response; several lengths parted by commas, K for 1024. By default 16K,32K,64K,128K.
    mini_steps
        Optimizer steps per rollout batch, κ; by default 4.
    codec
        What compresses the routing archive; raw compares with none.
    keep_order
        Archive the experts of a token in the engine's order.
    chunk_tokens
        Tokens per chunk of the routing archive.
    evolution_tokens
        Token positions of which router evolution is kept per iteration.
    evolution_dtype
        Precision of the hidden states kept.
    network_mb_s
        To the object store, in 10^6 bytes a second; by default 1000.
    """
    run = load_config(config) if config is not None else None
    if run is not None:
        run.rollout.require_unfinished()
    given = {
        "sequences": sequences,
        "mini_steps": mini_steps,
        "codec": codec,
        "keep_order": keep_order,
        "chunk_tokens": chunk_tokens,
        "evolution_tokens": evolution_tokens,
        "evolution_dtype": evolution_dtype,
        "network_mb_s": network_mb_s,
    }
    settings = (_told_by(run) if run else {}) | {key: value for key, value in given.items() if value is not None}
    longest = run and str(run.rollout.max_prompt_tokens + run.rollout.max_response_tokens)
    lengths = _lengths(tokens or longest or _DEFAULT_TOKENS)
    sizing = size_iteration(declared_routers(_config_file(model)), parse_as(Workload, settings), lengths)
    if json_:
        print(sizing.model_dump_json())
        return
    _show(sizing)
    _say_next(sizing, model, config, given)


def _config_file(model: str) -> Path:
    """The file or folder that `model` names, or else the cached config.json of the hub's model of that name."""
    path = Path(model).expanduser()
    if path.exists() or path.suffix == ".json" or not is_hub_name(model):
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return path
    if not isinstance(cached, str):
        raise ConfigError(
            f"there is no file or folder {model} here, and the config.json of the hub's model of that name is not in "
            f"the cache {HF_HUB_CACHE}; fetch it with: hf download {model} config.json, then give the same command "
            "again"
        )
    return Path(cached)


def _told_by(run: RunConfig) -> dict[str, Any]:
    settings = dotted(run.model_dump())
    told = {name: settings[key] for name, key in _KEYS.items()}
    evolution = {} if run.records_evolution else {"evolution_tokens": None}
    prompts = {"sequences": run.rollout.prompts, "carried_sequences": run.rollout.oversampled_prompts}
    return {name: number * run.rollout.responses for name, number in prompts.items()} | told | evolution


def _lengths(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+K?(,\d+K?)*", text):
        raise ConfigError(f"tokens are whole numbers parted by commas, K for 1024, as in 16K,128K; given: {text!r}")
    return tuple(int(part.removesuffix("K")) * (1024 if part.endswith("K") else 1) for part in text.split(","))


def _show(found: Sizing) -> None:
    load = found.workload
    carried = f" and {load.carried_sequences} carried to the next" if load.carried_sequences else ""
    told = (
        f"{found.model_type}: {len(found.layers)} MoE layers of {found.decoder_layers}, top-{found.top_k} of "
        f"{found.num_experts} experts, hidden size {found.hidden_size}; {load.sequences} sequences an "
        f"iteration{carried}, {load.mini_steps} mini-steps; {load.stored_as}, chunks of {load.chunk_tokens:,} tokens; "
        f"{load.network_mb_s:g} MB/s to the store"
    )
    out.print(escape(told), highlight=False, soft_wrap=True)
    out.print(_route_table(found))
    if found.evolution is not None:
        out.print(_evolution_table(found.evolution))
    for line in _notes(found):
        out.print(escape(line), highlight=False, soft_wrap=True)


def _route_table(found: Sizing) -> Table:
    table = Table(title="routes of an iteration, by tokens per sequence", title_justify="left")
    table.add_column("what")
    for routes in found.routes:
        table.add_column(_length(routes.tokens_per_sequence), justify="right", no_wrap=True)
    table.add_column("known", no_wrap=True)
    for section in _ROUTE_ROWS:
        table.add_section()
        for name, field, known in section:
            values = [getattr(routes, field) for routes in found.routes]
            if field != "carried_bytes" or found.workload.carried_sequences:
                table.add_row(escape(name), *(_shown(field, value) for value in values), known)
    return table


def _evolution_table(evolution: EvolutionSizing) -> Table:
    table = Table("what", title="router evolution and its predictor, of any length", title_justify="left")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("known", no_wrap=True)
    for name, field, known in _EVOLUTION_ROWS:
        table.add_row(escape(name), _shown(field, getattr(evolution, field)), known)
    return table


_Row = tuple[str, str, Literal["exact", "measured"]]
_ROUTE_ROWS: tuple[tuple[_Row, ...], ...] = (
    (
        ("raw", "raw_bytes", "exact"),
        ("bound, log2 C(E, K) bits a row", "bound_bytes", "exact"),
        ("archived", "stored_bytes", "measured"),
        ("kept with the rollout besides", "captured_bytes", "measured"),
        ("carried to the next, at most", "carried_bytes", "measured"),
        ("chunks", "chunks", "exact"),
        ("objects", "objects", "exact"),
        ("one stored chunk", "chunk_bytes", "measured"),
    ),
    (
        ("all, rollout process at its peak", "rollout_peak_bytes", "measured"),
        ("a sequence as vLLM returns it", "engine_bytes_per_sequence", "exact"),
        ("... in the rollout process", "trace_bytes_per_sequence", "exact"),
        ("... in the trainer's batch", "trainer_bytes_per_sequence", "exact"),
        ("... in a micro-batch, on device", "device_bytes_per_sequence", "exact"),
    ),
    (
        ("encode, one core", "encode_core_seconds", "measured"),
        ("decode, one core", "decode_core_seconds", "measured"),
        ("write all, checked, two cores", "write_seconds", "measured"),
        ("read all, checked, two cores", "read_seconds", "measured"),
        ("upload", "upload_seconds", "measured"),
    ),
)
_EVOLUTION_ROWS: tuple[_Row, ...] = (
    ("sampled tokens", "tokens", "exact"),
    ("raw", "raw_bytes", "exact"),
    ("stored", "stored_bytes", "measured"),
    ("objects", "objects", "exact"),
    ("of one mini-step, in memory", "mini_step_bytes", "exact"),
    ("write, checked", "write_seconds", "measured"),
    ("read, checked", "read_seconds", "measured"),
    ("upload", "upload_seconds", "measured"),
    ("predictor, each of two files", "predictor_bytes", "exact"),
    ("ridge fit, one thread", "fit_seconds", "measured"),
)


def _notes(found: Sizing) -> list[str]:
    shape = (
        f", on uniform routes of {found.measured_at[1]} of {found.measured_at[0]} experts" if found.measured_at else ""
    )
    notes = [
        f"exact: follows from the formats. measured: scales from docs/benchmarks.md, two shared CPU cores{shape}, the "
        "worst case for size",
        f"vLLM keeps {found.kv_token_bytes:,} bytes of routes in host memory for each token its KV cache has room for",
    ]
    if found.workload.codec == "raw":
        notes.append("raw is for comparison: an archive is written with expert-set or zstd")
    if found.evolution is None:
        notes.append("router evolution is not recorded under these settings")
    elif found.biased:
        notes.append(
            f"evolution of {found.model_type} is recorded only while selection biases are zero and experts are of one "
            "group, hardly ever for released weights (docs/models.md): replay with r2 or r3, which need none"
        )
    return notes


def _say_next(found: Sizing, model: str, config: Path | None, given: dict[str, Any]) -> None:
    """The run that was planned: its config, or where one has to be, and every setting given beside it."""
    path = Path(model)
    is_model = path.expanduser().is_dir() or not path.expanduser().exists()  # else a hub name, whose config was found
    folder = model if is_model else path.parent if path.name == "config.json" else "MODEL"
    asked = {key: given[name] for name, key in _KEYS.items() if given[name] is not None}
    settings = [f"model.path={folder}", *(f"{key}={str(value).lower()}" for key, value in asked.items())]
    if found.workload.codec == "raw":
        told = f"{command_name()} plan {model} --codec expert-set     (what an archive is written with)"
    else:
        told = " --set ".join([f"{command_name()} run {config or 'CONFIG.toml'}", *settings])
    out.print(escape(f"next:  {told}"), highlight=False, soft_wrap=True)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _shown(field: str, value: float | None) -> str:
    if value is None:
        return "-"
    if field.endswith("_seconds"):
        return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s" if value < 600 else f"{value / 60:,.0f} min"
    if "bytes" not in field:
        return f"{value:,}"
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if value >= u), (1e3, "kB"))
    return f"{value / unit:,.3g} {name}" if value < 1000 * unit else f"{value / unit:,.0f} {name}"
