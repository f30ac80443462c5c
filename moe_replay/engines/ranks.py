"""The ranks that compute a training engine's passes: one in its own process, or more of them under Ray."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensordict import TensorDict

from moe_replay.sections import ResourcesConfig, TrainingConfig


class RouterShape(NamedTuple):
    """What the routers of a model have in common."""

    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending."""
    hidden_size: int


class Ranks(Protocol):
    """What a training engine asks of its ranks. A batch holds all sequences, whatever rank computes them.

    Outputs are those of verl's engine: `model_output` nested in the order of the batch, `loss` to be summed over
    micro-batches and normalised over the whole batch, and the gradient's norm in `metrics`.
    """

    def build(self, model: Path) -> RouterShape:
        """Hold the Hugging Face model of this folder, with a fresh optimizer, in place of what was held before."""
        ...

    def restore(self, folder: Path) -> None:
        """Take optimizer and schedule from the checkpoint whose model was built."""
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint whose files do not depend on the number of ranks (`checkpoint.py`)."""
        ...

    def score(self, batch: TensorDict) -> dict[str, Any]:
        """A pass without gradient."""
        ...

    def step(self, batch: TensorDict) -> dict[str, Any]:
        """One optimizer step; what is returned was seen before the weights changed."""
        ...


def make_ranks(training: TrainingConfig, resources: ResourcesConfig) -> Ranks:
    """As many ranks as the config asks for.

    Raises ConfigError when Ray can't be reached or has no room for them.
    """
    if resources.training_world_size == 1:
        from moe_replay.engines.single_rank import SingleRank

        return SingleRank(training, resources)
    from moe_replay.engines.ray_ranks import RayRanks

    return RayRanks(training, resources)
