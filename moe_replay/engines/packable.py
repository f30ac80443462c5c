"""Whether the sequences of a model can lie end to end in one line, and be cut between ranks, told before a run starts.

In a packed micro-batch attention keeps sequences apart by their positions. Layers that carry a state along the line, or
convolve it, would need to be told where sequences end, which verl does for models whose `forward` names `cu_seqlens`
alone and transformers' families don't: they run on from one sequence into the next, and nothing fails. So do the
indexers of sparse attention, which choose keys by the rows of the line.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_replay.errors import ConfigError
from moe_replay.sections import ResourcesConfig, TrainingConfig

_CHUNKED = "chunked_attention"
WHOLE_ATTENTION = {"full_attention", "attention"}
"""Kinds of layers, as `layer_types` names them, whose tokens attend to all before them."""
_WITHOUT_ATTENTION = {"moe", "mlp"}  # in families where a mixer is a layer of its own (Nemotron-H)
_APART = {*WHOLE_ATTENTION, *_WITHOUT_ATTENTION, "sliding_attention", _CHUNKED}
_MIXERS = re.compile(r"mamba|deltanet|conv|recurrent|lightning|linear_?attn|linear_?attention|indexer")


def require_packable(model: Any, training: TrainingConfig, resources: ResourcesConfig) -> None:
    """Refuse `training.packing` for a transformers model, which may be empty, where its sequences would be mixed.

    Raises ConfigError for layers that are not attention, for chunks of attention shorter than a packed line, for masks
    that are made without positions, for heads that ranks can't share out, and for attention that
    `engines.ulysses_attention` does not do where it is chosen.
    """
    config = model.config.get_text_config()
    sharing = resources.training_sequence_parallel_size
    kinds = dict(enumerate(getattr(config, "layer_types", None) or []))
    _require_attention(kinds, model.get_decoder())
    line = training.micro_batch_tokens * sharing
    chunk = getattr(config, "attention_chunk_size", None)
    if _CHUNKED in kinds.values() and chunk and line > chunk:
        raise ConfigError(
            f"training.packing cuts chunks of attention out of the whole line, not out of each sequence, and a line of "
            f"{line} tokens (training.micro_batch_tokens * resources.training_sequence_parallel_size) is longer than "
            f"this model's chunks of {chunk}; set training.packing = false, or shorten the line to {chunk}"
        )
    if sharing == 1:
        if training.attention == "sdpa":
            _require_positions_in_masks(model.get_decoder())
        return
    _require_heads(config, sharing)
    windowed = {layer: kind for layer, kind in kinds.items() if kind not in WHOLE_ATTENTION | _WITHOUT_ATTENTION}
    if training.attention == "sdpa" and windowed:
        raise ConfigError(
            f"ranks that share sequences attend to all of a sequence without flash attention, and {_told(windowed)}; "
            "set training.attention = 'flash_attention_2' or resources.training_sequence_parallel_size = 1"
        )


def _require_attention(kinds: dict[int, str], decoder: nn.Module) -> None:
    """Refuse layers that the config or their modules say mix tokens otherwise than by attention."""
    other = dict(_other_mixers(decoder)) | {layer: kind for layer, kind in kinds.items() if kind not in _APART}
    if other:
        raise ConfigError(
            f"training.packing keeps the sequences of a line apart in attention alone, and {_told(other)}, which would "
            "run on from one sequence into the next; set training.packing = false"
        )


def _other_mixers(decoder: nn.Module) -> Iterator[tuple[int, str]]:
    """(Decoder layer, class) of modules inside numbered layers that carry a state along the line or convolve it."""
    for path, module in decoder.named_modules():
        parts = path.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), None)
        name = type(module).__name__
        if layer is not None and (_MIXERS.search(parts[-1].lower()) or _MIXERS.search(name.lower())):
            yield layer, name


def _require_positions_in_masks(decoder: nn.Module) -> None:
    """Refuse families whose code makes masks without position_ids, the only sign of where sequences end (AFMoE)."""
    for name, forward in {type(module).__name__: type(module).forward for module in decoder.modules()}.items():
        code = inspect.unwrap(forward)
        if not {"create_causal_mask", "create_sliding_window_causal_mask"} & {*code.__code__.co_names}:
            continue
        nodes = [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code))))]
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("create_")]
        given = [ast.unparse(key) for node in nodes if isinstance(node, ast.Dict) for key in node.keys if key]
        if "'position_ids'" not in given and not all("position_ids" in [k.arg for k in c.keywords] for c in calls):
            raise ConfigError(
                f"training.packing keeps the sequences of a line apart by their positions, and {name} makes its masks "
                "without them, so that each would attend to those before it; set training.packing = false, or "
                "training.attention = 'flash_attention_2', which is given the positions"
            )


def _require_heads(config: Any, sharing: int) -> None:
    """Refuse a number of ranks that verl would refuse once they have started."""
    heads = int(config.num_attention_heads)
    of_keys = int(getattr(config, "num_key_value_heads", None) or heads)
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (of_keys % n == 0 or n % of_keys == 0)]
    if sharing not in fitting:
        raise ConfigError(
            f"resources.training_sequence_parallel_size = {sharing} ranks take equal shares of the attention heads: it "
            f"must divide the model's A = {heads}, and divide its {of_keys} key/value heads or be a multiple of them; "
            f"set it to one of {', '.join(map(str, fitting))}"
        )


def _told(kinds: dict[int, str]) -> str:
    """The layers by their kind."""
    layers = {kind: [layer for layer in sorted(kinds) if kinds[layer] == kind] for kind in sorted({*kinds.values()})}
    return "decoder layers " + ", ".join(f"{numbers} of this model are {kind}" for kind, numbers in layers.items())
