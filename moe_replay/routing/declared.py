"""What routers a model's `config.json` declares, read as plain JSON: for what must answer fast and needs no torch.

`model_shape.router_shape` builds the model and looks; tests hold the two against each other, family by family.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_replay.errors import ConfigError
from moe_replay.routing.trace import route_dtype

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys under which families declare E."""
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k", "num_experts_per_token")
"""Keys under which families declare K."""

_REFUSED = {"phimoe": "makes no top-k call", "jetmoe": "has a second router, in attention"}
_BIASED = ("afmoe", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "glm4_moe", "longcat_flash", "nemotron_h")
# Families that have experts in every layer and no key that says so.
_EVERYWHERE = (
    *("aria", "aria_text", "flex_olmo", "gemma4_text", "gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe"),
    *("longcat_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
    *("qwen3_vl_moe_text", "qwen3_5_moe_text"),
)


class DeclaredRouters(NamedTuple):
    """The routers of a model as its config declares them."""

    model_type: str
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    num_experts: int
    """E, zero-compute experts included."""
    top_k: int
    """K."""
    hidden_size: int
    """H."""
    decoder_layers: int
    """All layers, dense ones included, layers of multi-token prediction not."""
    biased: bool
    """Whether experts are chosen by more than their logits (a selection bias, groups of experts)."""


def declared_routers(path: Path) -> DeclaredRouters:
    """The routers of the model whose config.json is `path` or lies in that folder.

    Raises ConfigError when there is no such file, the model is dense, can't be replayed, or its config does not say
    what its routers are.
    """
    document = read_model_config(path)
    whole = require_experts(document, path)
    kind = str(whole.get("model_type", document.get("model_type", "unknown type")))
    if kind in _REFUSED or whole.get("topk_method") == "group_limited_greedy":
        why = _REFUSED.get(kind, "zeroes scores outside the live groups before its choice")
        raise ConfigError(f"the model of {path} ({kind}) can't be replayed: its router {why}; see docs/models.md")
    num_layers = _decoder_layers(whole, path)
    num_experts = _number(whole, EXPERT_COUNT_KEYS, path) + int(whole.get("zero_expert_num") or 0)
    top_k, hidden_size = _number(whole, TOP_K_KEYS, path), _number(whole, ("hidden_size",), path)
    route_dtype(num_experts)
    if top_k > num_experts:
        raise ConfigError(f"{path} sends a token to {top_k} of {num_experts} experts; correct the config")
    layers = _moe_layers(whole, kind, num_layers, path)
    biased = kind in _BIASED or whole.get("topk_method") == "noaux_tc"
    return DeclaredRouters(kind, layers, num_experts, top_k, hidden_size, num_layers, biased)


def read_model_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or in config.json where that is a folder; raises ConfigError where there is none."""
    file = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} can't be read ({error}); give a Hugging Face model's folder on this machine, or its config.json"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file} is not a JSON object; give a Hugging Face model")
    return document


def require_experts(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The part of a model's config that declares more than one expert; raises ConfigError for a dense model."""
    for part in (document, document.get("text_config") or {}):
        if any(isinstance(part.get(key), int) and part[key] > 1 for key in EXPERT_COUNT_KEYS):
            return part
    raise ConfigError(
        f"the model in {path} ({document.get('model_type', 'unknown type')}) is dense: its config names none of "
        f"{', '.join(EXPERT_COUNT_KEYS)} above 1, so it has no routes to replay; choose a Mixture-of-Experts model"
    )


def _number(config: dict[str, Any], keys: tuple[str, ...], path: Path) -> int:
    value = next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
    if value is None:
        raise ConfigError(
            f"{path} has none of {', '.join(keys)} as a positive number; give the model's own config.json"
        )
    return value


def _decoder_layers(config: dict[str, Any], path: Path) -> int:
    if isinstance(blocks := config.get("layers_block_type") or config.get("hybrid_override_pattern"), list | str):
        return len(blocks)
    # LongCat counts its attentions, two to a layer, under the usual name.
    return _number(config, ("num_layers", "num_hidden_layers"), path)


def _moe_layers(config: dict[str, Any], kind: str, num_layers: int, path: Path) -> tuple[int, ...]:
    """By the first rule whose key the config has."""
    rule = next((rule for key, rule in _RULES.items() if config.get(key) is not None), None)
    if rule is None and kind not in _EVERYWHERE:
        raise ConfigError(
            f"{path} ({kind}) declares experts but not in which layers: it has none of {', '.join(_RULES)}; add the "
            "one that the model's code goes by"
        )
    try:
        layers = tuple(layer for layer in range(num_layers) if rule is None or rule(config, layer))
    except (TypeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} does not say which of {num_layers} layers have experts ({error!r})") from error
    if not layers:
        raise ConfigError(f"the model in {path} is dense: none of its {num_layers} layers has experts")
    return layers


def _after_dense(config: dict[str, Any], layer: int) -> bool:
    """DeepSeek's: dense layers first, then experts in every so many, or where a list of flags has one."""
    frequency = config.get("moe_layer_freq") or 1
    chosen = frequency[layer] if isinstance(frequency, list) else layer % frequency == 0
    return layer >= config.get("first_k_dense_replace", 0) and bool(chosen)


def _sparse_step(config: dict[str, Any], layer: int) -> bool:
    """Qwen's."""
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0


def _interval(config: dict[str, Any], layer: int) -> bool:
    """ERNIE's."""
    first, last = config["moe_layer_start_index"], config.get("moe_layer_end_index", -1)
    return first <= layer and (last == -1 or layer <= last) and (layer + 1) % config.get("moe_layer_interval", 1) == 0


_RULES: dict[str, Callable[[dict[str, Any], int], bool]] = {
    "mlp_layer_types": lambda config, layer: config["mlp_layer_types"][layer] in ("moe", "sparse"),
    "layers_block_type": lambda config, layer: config["layers_block_type"][layer] == "moe",
    "hybrid_override_pattern": lambda config, layer: config["hybrid_override_pattern"][layer] == "E",
    "moe_layers": lambda config, layer: layer in config["moe_layers"],
    "interleave_moe_layer_step": lambda config, layer: (layer + 1) % config["interleave_moe_layer_step"] == 0,
    "expert_layer_period": lambda config, layer: layer % config["expert_layer_period"] == config["expert_layer_offset"],
    "moe_layer_start_index": _interval,
    "num_dense_layers": lambda config, layer: layer >= config["num_dense_layers"],
    "first_k_dense_replace": _after_dense,
    "moe_layer_freq": _after_dense,
    "mlp_only_layers": _sparse_step,
    "decoder_sparse_step": _sparse_step,
}
