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

NO_ROUTE = -1
"""Fills the rows of `routed_experts` that have no route; they are routed live."""


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
            fields[name] = _with_gaps(traces)
        if self.sampled is not None:
            pairs = enumerate(zip(self.sampled, sequences, strict=True))
            flags = [_flags(number, places, one) for number, (places, one) in pairs]
            fields["sampled_rows"] = _jagged(torch.cat(flags), torch.tensor([len(one) for one in flags]))
        return fields


def token_fields(sequences: Sequence[TokenSequence], per_token: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """verl's fields of the tokens, and of what there is for each response token, given as [N, S]."""
    prompts, responses = ([getattr(one, name) for one in sequences] for name in ("prompt_ids", "response_ids"))
    prompt_N, response_N = (torch.tensor([len(ids) for ids in rows]) for rows in (prompts, responses))
    total_N = prompt_N + response_N
    position_T = torch.arange(int(total_N.sum())) - (total_N.cumsum(0) - total_N).repeat_interleave(total_N)
    pieces = [ids for one in sequences for ids in (one.prompt_ids, one.response_ids)]
    fields = {
        "input_ids": _jagged(torch.cat(pieces), total_N),
        "position_ids": _jagged(position_T, total_N),
        "prompts": _jagged(torch.cat(prompts), prompt_N),
        "responses": _jagged(torch.cat(responses), response_N),
        "response_mask": _jagged(torch.ones(int(response_N.sum()), dtype=torch.int64), response_N),
        "loss_mask": _jagged((position_T >= prompt_N.repeat_interleave(total_N)).float(), total_N),
    }
    for name, values_NS in per_token.items():
        fields[name] = _jagged(values_NS[torch.arange(values_NS.shape[1]) < response_N[:, None]], response_N)
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


def _jagged(values: Tensor, length_N: Tensor) -> Tensor:
    """One nested tensor of N rows of `length_N` in their first dimension, which lie one after the other in `values`.

    Made at once: of a list of rows torch makes it row by row, which takes as long as a small model's forward pass.
    """
    offsets = torch.cat([length_N.new_zeros(1), length_N.cumsum(0)])
    shortest, longest = int(length_N.min()), int(length_N.max())
    return torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=shortest, max_seqlen=longest)


def _require_tokens(number: int, trace: RoutingTrace, sequence: TokenSequence) -> None:
    if trace.num_tokens != sequence.num_tokens:
        raise RoutingMismatch(
            f"routes cover {trace.num_tokens} rows but sequence {number} has {sequence.num_tokens} tokens; "
            "they belong to other tokens: re-run the rollout, routes are never padded"
        )


def _with_gaps(traces: Sequence[RoutingTrace]) -> Tensor:
    """Traces as verl's `routed_experts`: int32 [N, T, L, K], nested by sequence, -1 where there is no route."""
    ids_TLK = np.concatenate([trace.ids_TLK for trace in traces], dtype=np.int32)
    ids_TLK[~np.concatenate([trace.valid_T for trace in traces])] = NO_ROUTE
    return _jagged(torch.from_numpy(ids_TLK), torch.tensor([trace.num_tokens for trace in traces]))


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
