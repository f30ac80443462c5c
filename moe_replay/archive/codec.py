"""The expert-set codec as zarr knows it: array to bytes, one chunk at a time, by the name that array metadata says."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from moe_replay.archive.expert_sets import decode_sets, encode_sets
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import route_dtype

NAME = "moe-replay.expert-set"
VERSION = 1


@dataclass(frozen=True)
class ExpertSetCodec(ArrayBytesCodec):
    """Chunks of shape [..., K] whose rows are sets of K of `num_experts`, or zeros where a route is missing.

    Rows come back sorted ascending unless `keep_order`. Reading a chunk raises ArchiveCorrupt when it is damaged,
    writing one RoutingMismatch when a row is no set.
    """

    num_experts: int
    keep_order: bool = False

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ExpertSetCodec":
        """The codec of array metadata; raises ArchiveCorrupt for another version and for keys this one lacks."""
        settings = data.get("configuration")
        known = {"version", "num_experts", "keep_order"}
        if data.get("name") != NAME or not isinstance(settings, dict) or settings.keys() != known:
            raise ArchiveCorrupt(f"codec metadata {data} should be {NAME} with {sorted(known)}; the archive is damaged")
        version, num_experts, keep_order = settings["version"], settings["num_experts"], settings["keep_order"]
        if version != VERSION:
            raise ArchiveCorrupt(
                f"chunks were written by version {version!r} of {NAME}, this code reads {VERSION}; read them with the "
                "moe-replay that wrote them"
            )
        if type(num_experts) is not int or not 1 <= num_experts <= 65536 or type(keep_order) is not bool:
            raise ArchiveCorrupt(
                f"{NAME} has {num_experts!r} experts and keep_order {keep_order!r}; expected 1 to 65536 and a bool: "
                "the archive is damaged"
            )
        return cls(num_experts, keep_order)

    def to_dict(self) -> dict[str, Any]:
        """What array metadata says of the codec."""
        settings = {"version": VERSION, "num_experts": self.num_experts, "keep_order": self.keep_order}
        return {"name": NAME, "configuration": settings}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Raise RoutingMismatch unless an array can hold such rows: its dtype fits, and no row is cut by a chunk."""
        wanted, native = np.dtype(route_dtype(self.num_experts)), dtype.to_native_dtype()
        chunk_shape = getattr(chunk_grid, "chunk_shape", shape)
        cut = not shape or chunk_shape[-1] != shape[-1] or not 1 <= shape[-1] <= self.num_experts
        if native != wanted or cut:
            raise RoutingMismatch(
                f"routes of {self.num_experts} experts are {wanted} of shape [..., 1 to {self.num_experts} experts] "
                f"in chunks of whole rows; this array is {native} of shape {shape} in chunks of {chunk_shape}"
            )

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known before encoding."""
        raise NotImplementedError

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        coded = await asyncio.to_thread(self._encode, chunk_data.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(coded)

    def _encode(self, ids: np.ndarray) -> bytes:
        # Chunks of a layer-major array are strided where routes come token-major; copying takes as long as coding.
        ids_RK = np.ascontiguousarray(ids).reshape(-1, ids.shape[-1])
        return encode_sets(ids_RK, self.num_experts, self.keep_order)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        *outer, top_k = chunk_spec.shape
        shape = (math.prod(outer), top_k)
        coded = chunk_data.to_bytes()
        ids_RK = await asyncio.to_thread(decode_sets, coded, shape, self.num_experts, self.keep_order)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(ids_RK.reshape(chunk_spec.shape))


# Archives are also read where the package's entry points are not installed.
register_codec(NAME, ExpertSetCodec)
