"""Megatron-Core, verl's Megatron engine and mbridge at work on a CPU: what of them names a GPU is led to the CPU.

verl imports this by VERL_USE_EXTERNAL_MODULES. Written against Megatron-Core 0.16.1, mbridge 0.15.1, verl 0.9.1. What
is led elsewhere, and why:
- `torch.cuda`'s current device, streams, synchronisation and random state, and `.cuda()`: to the CPU's. Megatron names
  the device "cuda" in code where others ask which one there is.
- Tensors made with `device="cuda"` are made on the CPU, and a CPU tensor's `type()` says "torch.cuda...", by which
  Megatron's optimizers tell precisions apart.
- `te_general_gemm`, a name that the router of Megatron-Core 0.16.1 looks up and, where Transformer Engine is missing,
  never defines: it is set to None, upon which the router multiplies by torch, as the code beside the name does.
- Counts of tokens that the dispatch to experts fetches from the GPU as numpy's, and leaves as they are where they are
  not on one, become numpy's: gloo, which sends by them, takes no tensors.
- mbridge builds models of Transformer Engine's layers, which need a GPU. Its Qwen3-MoE bridge is subclassed here to
  take Megatron-Core's own layers, chosen by Megatron-Core's own function, without fused kernels, and to know their
  names.
- Megatron-Core's own attention takes no packed sequences: it is called for each sequence of a line by itself.
- moe-replay's check that refuses machines without a GPU is told that nothing is missing.

Nothing else differs: model, router, dispatch to experts, schedule, gradients' buffers, optimizer, loss and the
conversion of weights are those of the packages.
"""

import re
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import random
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor
from torch.utils._device import _device_constructors

from moe_replay.engines import megatron_settings

# verl's engines ask for their platform when they are imported: this registers it.
from moe_replay.engines.verl_plugin import PlatformCPU  # isort: split  # noqa: F401

_FACTORIES = ("tensor", "zeros", "empty", "ones", "full", "arange")
_WITHOUT_FUSED_KERNELS = {
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "moe_grouped_gemm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
}


class Stream(torch.cpu.Stream):
    """A stream whose events can be waited for, which torch's own of a CPU lacks."""

    def record_event(self, event: Any = None) -> Any:
        return torch.cpu.Event()


class PackedAttention(DotProductAttention):
    """Megatron-Core's attention, sequence by sequence of a packed line [T, heads, size]."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **given: Any
    ) -> Tensor:
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        spans = [slice(start, end) for start, end in pairwise(bounds)]
        parts = [
            super(PackedAttention, self).forward(*(x[span, None] for x in (query, key, value)), None, **given)
            for span in spans
        ]
        return torch.cat(parts).squeeze(1)


def _redirect_torch() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = Stream
    cuda.current_stream = cuda.default_stream = torch.cpu.current_stream
    cuda.stream = lambda stream: nullcontext()
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_: self
    type_of = tensor.type
    tensor.type = lambda self, *to, **how: (
        type_of(self, *to, **how) if to or how else type_of(self).replace("torch.", "torch.cuda.")
    )
    _device_constructors()  # torch lists them once, and must list its own
    for name in _FACTORIES:
        setattr(torch, name, _made_on_cpu(getattr(torch, name)))


def _made_on_cpu(factory: Any) -> Any:
    def make(*args: Any, **given: Any) -> Any:
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        return factory(*args, **given)

    return make


def _redirect_megatron() -> None:
    megatron_random: Any = random
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    router: Any = moe_utils
    router.te_general_gemm = None
    dispatch: Any = token_dispatcher
    dispatch.maybe_move_tensor_to_cpu = _on_host
    megatron_settings.missing_here = list


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _take_megatrons_own_layers() -> None:
    from mbridge.core import register_model
    from mbridge.models.qwen3moe import Qwen3MoEBridge

    class LocalBridge(Qwen3MoEBridge):
        """mbridge's, of Megatron-Core's own layers: norms are modules of their own, and experts too."""

        def _build_base_config(self, **given: Any) -> Any:
            return super()._build_base_config(**given | _WITHOUT_FUSED_KERNELS)

        def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
            self.has_vp_stage = True
            spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = PackedAttention
            return spec

        def _weight_name_mapping_mcore_local_to_global(self, model: Any, consider_ep: bool = True) -> dict[str, str]:
            names = super()._weight_name_mapping_mcore_local_to_global(model, consider_ep)
            first = self.mpu.ep_rank * self.config.num_moe_experts // self.mpu.ep_size if consider_ep else 0
            return {name: _as_grouped(whole, first) for name, whole in names.items()}

        def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
            return super()._weight_name_mapping_mcore_to_hf(
                mcore_weights_name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            )

    register_model("qwen3_moe")(LocalBridge)


def _as_grouped(name: str, first: int) -> str:
    """An expert's weight by the name that it has among grouped experts, counted from the `first` of this rank."""
    return re.sub(
        r"local_experts\.(\d+)\.(linear_fc\d)\.weight",
        lambda found: f"{found[2]}.weight{int(found[1]) + first}",
        name,
    )


_redirect_torch()
_redirect_megatron()
_take_megatrons_own_layers()
