"""Sequences, and what a pass does with routes, in verl's layout: nested tensors without padding.

Shapes: N sequences, S response tokens of the longest, T tokens of one sequence, L MoE layers, K experts per token,
E experts, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace


@dataclass(frozen=True)
class TokenSequence:
    """Prompt and response of one sample."""

    prompt_ids: Tensor
    response_ids: Tensor

    @property
    def num_tokens(self) -> int:
        """T, prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class PassRoutes:
    """Which experts serve a pass, and what is kept of its routers. Lists hold one entry a sequence.

    Raises ConfigError when routes are to be both replayed and predicted.
    """

    replayed: Sequence[RoutingTrace] | None
    reference: Sequence[RoutingTrace] | None = None
    """Routes whose coverage gap is measured; those replayed by default."""
    sampled: Sequence[npt.NDArray[np.int64]] | None = None
    """Positions of the tokens whose router features are kept, ascending."""
    predictor: Mapping[int, Tensor] | None = None
    """W_p [E, H] by decoder layer."""

    def __post_init__(self) -> None:
        if self.replayed is not None and self.predictor is not None:
            raise ConfigError(
                "a pass replays routes or predicts them, and this one was given both: "
                "leave out its routes, or compare with them by giving them as reference"
            )

    def fields(
        self, sequences: Sequence[TokenSequence], num_experts: int, top_k: int, layers: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """The fields of `ReplayEngine`'s batches that say so.

        Raises RoutingMismatch for routes of another model or of other tokens, and positions that are no sample of
        their sequence's.
        """
        fields = {}
        for name, traces in (("routed_experts", self.replayed), ("reference_experts", self.reference)):
            if traces is None or (name == "reference_experts" and traces is self.replayed):
                continue
            for number, (trace, sequence) in enumerate(zip(traces, sequences, strict=True)):
                trace.require_model(num_experts, top_k, layers, f"the trace of sequence {number}")
                _require_tokens(number, trace, sequence)
            fields[name] = nested([_with_gaps(trace) for trace in traces])
        if self.sampled is not None:
            pairs = enumerate(zip(self.sampled, sequences, strict=True))
            fields["sampled_rows"] = nested([_flags(number, places, one) for number, (places, one) in pairs])
        return fields


def token_fields(sequences: Sequence[TokenSequence], per_token: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """verl's fields of the tokens, and of what there is for each response token, given as [N, S]."""
    whole = [torch.cat([sequence.prompt_ids, sequence.response_ids]) for sequence in sequences]
    lengths = [len(sequence.response_ids) for sequence in sequences]
    fields = {
        "input_ids": nested(whole),
        "position_ids": nested([torch.arange(len(ids)) for ids in whole]),
        "prompts": nested([sequence.prompt_ids for sequence in sequences]),
        "responses": nested([sequence.response_ids for sequence in sequences]),
        "response_mask": nested([torch.ones(length, dtype=torch.int64) for length in lengths]),
        "loss_mask": nested(
            [torch.cat([torch.zeros(len(s.prompt_ids)), torch.ones(len(s.response_ids))]) for s in sequences]
        ),
    }
    for name, values_NS in per_token.items():
        fields[name] = nested([row[:length] for row, length in zip(values_NS, lengths, strict=True)])
    return fields


def as_batch(fields: dict[str, Tensor], sequences: int, packing: bool, **settings: object) -> TensorDict:
    """The batch of N sequences that verl cuts into micro-batches, packed or padded."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    batch = TensorDict(dict(fields), batch_size=[sequences])
    tu.assign_non_tensor(
        batch,
        use_dynamic_bsz=True,
        use_remove_padding=packing,
        use_fused_kernels=False,
        pad_mode=DatasetPadMode.NO_PADDING,
        return_model_output=True,
        global_batch_size=sequences,
        **settings,
    )
    return batch


def nested(rows: list[Tensor]) -> Tensor:
    """One tensor of rows that differ in their first dimension."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _require_tokens(number: int, trace: RoutingTrace, sequence: TokenSequence) -> None:
    if trace.num_tokens != sequence.num_tokens:
        raise RoutingMismatch(
            f"routes cover {trace.num_tokens} rows but sequence {number} has {sequence.num_tokens} tokens; "
            "they belong to other tokens: re-run the rollout, routes are never padded"
        )


def _with_gaps(trace: RoutingTrace) -> Tensor:
    """The trace as verl's `routed_experts` of one sequence: int32 [T, L, K], -1 where there is no route."""
    from moe_replay.engines.observed_passes import NO_ROUTE

    ids_TLK = torch.from_numpy(trace.ids_TLK.astype("int32"))
    ids_TLK[~torch.from_numpy(trace.valid_T)] = NO_ROUTE
    return ids_TLK


def _flags(number: int, positions: npt.NDArray[np.int64], sequence: TokenSequence) -> Tensor:
    """Which tokens of a sequence are sampled, bool [T]."""
    tokens = sequence.num_tokens
    inside = positions.size == 0 or 0 <= int(positions[0]) <= int(positions[-1]) < tokens
    if not inside or (np.diff(positions) <= 0).any():
        raise RoutingMismatch(
            f"sampled positions ascend within 0..{tokens - 1}, and those of sequence {number} are "
            f"{positions[:8].tolist()}{'...' if positions.size > 8 else ''}: they belong to other tokens"
        )
    flags_T = torch.zeros(tokens, dtype=torch.bool)
    flags_T[torch.from_numpy(positions)] = True
    return flags_T
