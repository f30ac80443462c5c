"""Megatron-Core on a CPU: each place where it names a CUDA device is led to the CPU, and nothing else."""

from contextlib import nullcontext
from typing import Any

import torch


class Stream(torch.cpu.Stream):
    def record_event(self, event=None):
        return torch.cpu.Event()


def redirect() -> None:
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    stream = Stream()
    cuda.Stream = lambda *args, **kwargs: stream
    cuda.current_stream = lambda: stream
    cuda.stream = lambda stream: nullcontext()
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args: self
    plain_type = torch.Tensor.type
    torch.Tensor.type = lambda self, *args: plain_type(self, *args) if args else plain_type(self).replace("torch.", "torch.cuda.")
    from torch.utils._device import _device_constructors
    _device_constructors()
    for name in ("tensor", "zeros", "empty", "ones", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    from megatron.core.tensor_parallel import random
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    from megatron.core.transformer.moe import moe_utils
    moe_utils.te_general_gemm = None


def _on_cpu(factory):
    def made(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)
    return made


def local_bridge():
    import re
    from verl.models.mcore import mbridge
    from mbridge.core import register_model
    from mbridge.models.qwen3moe import Qwen3MoEBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron.core.transformer.dot_product_attention import DotProductAttention
    class PackedAttention(DotProductAttention):
        def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            whole = []
            for a, b in zip(bounds, bounds[1:]):
                whole.append(super().forward(query[a:b, None], key[a:b, None], value[a:b, None], None, **kwargs))
            return torch.cat(whole).squeeze(1)

    @register_model("qwen3_moe")
    class LocalQwen3MoEBridge(Qwen3MoEBridge):
        def _build_base_config(self, **kwargs):
            return super()._build_base_config(**(kwargs | dict(persist_layer_norm=False, masked_softmax_fusion=False, moe_grouped_gemm=False, bias_activation_fusion=False, bias_dropout_fusion=False)))
        def _get_transformer_layer_spec(self, vp_stage=None):
            self.has_vp_stage = True
            spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = PackedAttention
            return spec
        def _weight_name_mapping_mcore_to_hf(self, name):
            name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            name = re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)
            return super()._weight_name_mapping_mcore_to_hf(name)
