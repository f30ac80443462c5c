"""Named tensors in one folder, as safetensors files of bounded size."""

from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor

_SHARD_SIZE = "4GB"


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write whole tensors to `<name>*.safetensors`; no file for none."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        alone = {key: _alone(tensor) for key, tensor in tensors.items()}
        pattern = f"{name}{{suffix}}.safetensors"
        save_torch_state_dict(alone, folder, filename_pattern=pattern, max_shard_size=_SHARD_SIZE)


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all safetensors files in a folder whose name is wanted, one at a time."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in filter(wanted, file.keys()):
                yield key, file.get_tensor(key)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: gathered from uneven shards it is a part of what was padded."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
