"""A rollout batch as training takes it: tensors of its samples, without their routes, which the archive holds.

Shapes: N sequences of the rollout batch, S response tokens of the longest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_replay.engines.training import TokenSequence
from moe_replay.stages.samples import Answer


@dataclass(frozen=True)
class Responses:
    """The samples of a rollout batch."""

    sequences: list[TokenSequence]
    sequence_ids: list[int]
    digests: list[bytes]
    mask_NS: Tensor
    rollout_NS: Tensor
    """Log-probs that the inference engine sampled with."""
    rewards_N: Tensor
    groups_N: np.ndarray

    @classmethod
    def of(cls, answers: Iterator[Answer]) -> "Responses":
        """Take what training needs of each answer."""
        kept = [
            (
                TokenSequence(torch.tensor(answer.prompt_ids), torch.tensor(answer.response_ids)),
                torch.tensor(answer.log_probs),
                (answer.sequence_id, answer.token_digest, answer.reward, answer.group),
            )
            for answer in answers
        ]
        sequences, log_probs, told = zip(*kept, strict=True)
        sequence_ids, digests, rewards, groups = zip(*told, strict=True)
        lengths = [torch.ones(len(sequence.response_ids), dtype=torch.bool) for sequence in sequences]
        return cls(
            list(sequences),
            list(sequence_ids),
            list(digests),
            pad_sequence(lengths, batch_first=True),
            pad_sequence(list(log_probs), batch_first=True),
            torch.tensor(rewards),
            np.array(groups),
        )

    def of_tokens(self, values_NS: Tensor) -> list[np.ndarray]:
        """What a padded table holds of each sequence's response tokens."""
        return [row[mask].numpy() for row, mask in zip(values_NS, self.mask_NS, strict=True)]

    def parts(self, number: int) -> list[slice]:
        """The batch in `number` mini-batches of equal size."""
        size = len(self.sequences) // number
        return [slice(part * size, (part + 1) * size) for part in range(number)]
