"""What every zarr group of an artifact has in common: written plainly, opened only when it is what its format says."""

from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import ValidationError
from zarr.codecs import Crc32cCodec, ZstdCodec

from moe_replay.archive.provenance import GroupProvenance
from moe_replay.archive.reading import Artifact
from moe_replay.archive.zarr_stores import HashingStore
from moe_replay.errors import ArchiveCorrupt, ReplayError

PLAIN_CODECS = ("bytes", "zstd", "crc32c")
"""The codec chain of arrays that need none of their own."""

_PLAIN = [ZstdCodec(level=3), Crc32cCodec()]

Provenance = TypeVar("Provenance", bound=GroupProvenance)


@dataclass(frozen=True)
class GroupFormat:
    """A kind of group: where it lies, and what its attributes say."""

    title: str
    """For messages, e.g. `routing archive`."""
    content: str
    """For messages, e.g. `routes`."""
    stage: str
    """The stage whose artifacts have it."""
    group: str
    """Folder within the artifact."""
    name: str
    """The attribute `format`."""
    version: int
    """The attribute `format_version`."""

    def attributes(self, provenance: GroupProvenance) -> dict[str, Any]:
        """The attributes of a group of this format."""
        return {"format": self.name, "format_version": self.version, "provenance": provenance.model_dump(mode="json")}

    def corrupt(self, artifact: Artifact, what: str) -> ArchiveCorrupt:
        """The error that says what of the artifact's group is wrong."""
        return ArchiveCorrupt(
            f"{self.title} {artifact.name} is not what it should be: {what}; restore it, or delete the stage's "
            "folder and resume the run to make it again"
        )

    def open(self, artifact: Artifact, model: type[Provenance]) -> tuple[zarr.Group, Provenance]:
        """The group and its provenance.

        Raises ArchiveCorrupt unless the format is known and the group is of the run and iteration of its commit,
        ConfigError when retention removed it.
        """
        commit = artifact.commit
        if commit.stage != self.stage:
            raise self.corrupt(artifact, f"it was committed by stage {commit.stage!r}, expected {self.stage!r}")
        try:
            group = zarr.open_group(artifact.zarr_store(self.group), mode="r", zarr_format=3)
            attributes = dict(group.attrs)
        except ReplayError:
            raise
        except Exception as error:  # zarr meets malformed metadata with errors of any kind
            what = f"it holds no readable zarr group {self.group!r} ({type(error).__name__})"
            raise self.corrupt(artifact, what) from error
        found = (attributes.get("format"), attributes.get("format_version"))
        if found != (self.name, self.version):
            raise self.corrupt(artifact, f"its format is {found}, this code reads {(self.name, self.version)}")
        try:
            provenance = model.model_validate(attributes.get("provenance"))
        except ValidationError as error:
            raise self.corrupt(artifact, f"its provenance breaks the format: {first_line(error)}") from error
        self._require_in_place(artifact, provenance)
        return group, provenance

    def open_array(
        self, artifact: Artifact, group: zarr.Group, name: str, codecs: tuple[tuple[str, ...], ...] = (PLAIN_CODECS,)
    ) -> zarr.Array:
        """An array of one of these codec chains, all of whose chunks the commit names; none is read yet."""
        try:
            array = group[name]
        except ReplayError:
            raise
        except Exception as error:  # as for the group
            raise self.corrupt(artifact, f"array {name} can't be read ({type(error).__name__})") from error
        if not isinstance(array, zarr.Array):
            raise self.corrupt(artifact, f"{name} is not an array")
        if codec_names(array) not in codecs:
            raise self.corrupt(artifact, f"array {name} has the codecs {codec_names(array)}, the format knows {codecs}")
        # zarr reads a chunk that is not there as zeros.
        committed = {stored.path for stored in artifact.commit.objects}
        for index in product(
            *(range(-(-size // chunk)) for size, chunk in zip(array.shape, array.chunks, strict=True))
        ):
            path = f"{self.group}/{name}/{array.metadata.encode_chunk_key(index)}"
            if path not in committed:
                raise self.corrupt(artifact, f"its commit does not name {path}, a chunk of shape {array.shape}")
        return array

    def require(self, artifact: Artifact, array: zarr.Array, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Raise ArchiveCorrupt unless the array has this shape and dtype."""
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise self.corrupt(
                artifact,
                f"array {array.basename} is {array.dtype} of shape {array.shape}, its provenance says "
                f"{np.dtype(dtype)} of shape {shape}",
            )

    def read_part(self, artifact: Artifact, array: zarr.Array, part: Any) -> npt.NDArray[Any]:
        """A part of an array; raises ArchiveCorrupt when a chunk of it can't be decoded."""
        try:
            return np.asarray(array[part])
        except ReplayError:
            raise
        except Exception as error:  # codecs of zarr meet bytes that aren't theirs with errors of any kind
            what = f"a chunk of {self.group}/{array.basename} in {part} can't be decoded ({first_line(error)})"
            raise self.corrupt(artifact, what) from error

    def _require_in_place(self, artifact: Artifact, provenance: GroupProvenance) -> None:
        commit = artifact.commit
        ours, theirs = (commit.run_id, commit.iteration), (provenance.run_id, provenance.iteration)
        if ours != theirs:
            raise self.corrupt(
                artifact,
                f"its {self.content} are of run {theirs[0]}, iteration {theirs[1]}, its commit of run {ours[0]}, "
                f"iteration {ours[1]}",
            )


def create_array(
    store: HashingStore,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: npt.DTypeLike,
    serializer: Any = "auto",
    compressors: Any = _PLAIN,
) -> zarr.Array:
    """A new array of a group, of which every chunk that is written is stored; plain codecs unless others are given."""
    return zarr.create_array(
        store,
        name=name,
        shape=shape,
        chunks=chunks,
        dtype=np.dtype(dtype),
        serializer=serializer,
        compressors=compressors,
        fill_value=0,
        zarr_format=3,
        # A chunk left out because it is all zeros could not be told from one that was lost.
        config={"write_empty_chunks": True},
    )


def codecs(array: zarr.Array) -> list[Any]:
    """The codecs of an array, each with its `name` and perhaps its `configuration`."""
    return array.metadata.to_dict()["codecs"]  # pyright: ignore[reportReturnType]


def codec_names(array: zarr.Array) -> tuple[str, ...]:
    """The names of an array's codecs, in the order of writing."""
    return tuple(str(codec["name"]) for codec in codecs(array))


def first_line(error: Exception) -> str:
    """What an error says, in one short line; of pydantic's the first finding, without the input."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0][:200] or type(error).__name__
