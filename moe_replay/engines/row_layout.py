"""Which rows of a forward pass hold which tokens, in the two layouts that verl gives a micro-batch.

Padded, sequences are rows of a table as wide as the longest. Packed, they lie end to end, and ranks that share
sequences (DeepSpeed-Ulysses, arXiv 2309.14509) hold equal parts of that line, the end of which is filled up.

Shapes: T tokens of all sequences, R rows that the routers of one rank see, S tokens that are watched, those of one rank
on the way in and of all ranks on the way out.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class RowLayout(Protocol):
    """Where tokens lie in the rows of this rank; tensors stay on their device."""

    real_R: Tensor
    """bool [R]: the rows that hold a token."""

    def to_rows(self, values_T: Tensor, fill: int) -> Tensor:
        """Values of all tokens [T, ...], on the rows of this rank [R, ...], with `fill` in rows without a token."""
        ...

    def to_tokens(self, values_R: Tensor) -> Tensor:
        """Values of the rows of all ranks that share the sequences [R, ...], by token [T, ...]."""
        ...

    def watched_to_tokens(self, values_S: Tensor, watched_T: Tensor) -> Tensor:
        """Values of the watched tokens of this rank [S, ...] together with those of the others, in order of tokens."""
        ...


class PaddedRows:
    """Sequences side by side, each padded to the longest."""

    def __init__(self, lengths_B: Tensor):
        """Of B sequences of so many tokens."""
        self.real_R = (torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]).reshape(-1)

    def to_rows(self, values_T: Tensor, fill: int) -> Tensor:
        """See `RowLayout.to_rows`."""
        values_R = values_T.new_full((self.real_R.numel(), *values_T.shape[1:]), fill)
        values_R[self.real_R.to(values_T.device)] = values_T
        return values_R

    def to_tokens(self, values_R: Tensor) -> Tensor:
        """See `RowLayout.to_tokens`."""
        return values_R[self.real_R.to(values_R.device)]

    def watched_to_tokens(self, values_S: Tensor, watched_T: Tensor) -> Tensor:
        """See `RowLayout.watched_to_tokens`; one rank has them all."""
        return values_S


class PackedRows:
    """Sequences end to end, and of that line the part of this rank."""

    def __init__(self, num_tokens: int, group: ProcessGroup | None = None):
        """`group` holds the ranks that share the sequences; none for a rank that has them to itself."""
        self._num_tokens, self._group = num_tokens, group
        self._ranks = torch.distributed.get_world_size(group) if group else 1
        self._rank = torch.distributed.get_rank(group) if group else 0
        self._rows = -(-num_tokens // self._ranks)
        self.real_R = self.to_rows(torch.ones(num_tokens, dtype=torch.bool), False)

    def to_rows(self, values_T: Tensor, fill: int) -> Tensor:
        """See `RowLayout.to_rows`."""
        return self._by_rank(values_T, fill)[self._rank]

    def to_tokens(self, values_R: Tensor) -> Tensor:
        """See `RowLayout.to_tokens`."""
        if self._group is None:
            return values_R
        return torch.cat(self._gather(values_R))[: self._num_tokens]

    def watched_to_tokens(self, values_S: Tensor, watched_T: Tensor) -> Tensor:
        """See `RowLayout.watched_to_tokens`."""
        if self._group is None:
            return values_S
        # Every rank knows what the others watch; parts of one size are what a collective takes.
        counts = self._by_rank(watched_T, False).sum(1).tolist()
        filled = values_S.new_zeros((max(counts), *values_S.shape[1:]))
        filled[: len(values_S)] = values_S
        return torch.cat([part[:count] for part, count in zip(self._gather(filled), counts, strict=True)])

    def _by_rank(self, values_T: Tensor, fill: int) -> Tensor:
        """[ranks, R, ...]."""
        line = values_T.new_full((self._ranks * self._rows, *values_T.shape[1:]), fill)
        line[: self._num_tokens] = values_T
        return line.reshape(self._ranks, self._rows, *values_T.shape[1:])

    def _gather(self, values: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(values) for _ in range(self._ranks)]
        torch.distributed.all_gather(parts, values.contiguous(), group=self._group)
        return parts
