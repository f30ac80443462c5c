import json
import subprocess
import sys

import numpy as np
import pytest
import zarr
from set_samples import random_sets
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from moe_replay.archive.codec import NAME, ExpertSetCodec
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch


def write(ids, num_experts=128, chunk=64, store=None, **kwargs):
    array = zarr.create_array(
        store if store is not None else MemoryStore(),
        name="ids",
        shape=ids.shape,
        chunks=(1, chunk, ids.shape[-1]),
        dtype=ids.dtype,
        serializer=ExpertSetCodec(num_experts, **kwargs),
        compressors=[Crc32cCodec()],
        fill_value=0,
        zarr_format=3,
        config={"write_empty_chunks": True},
    )
    array[:] = ids
    return array


def layers_of_routes(rows=200, num_experts=128, top_k=8):
    return np.stack([random_sets(rows, num_experts, top_k, seed=layer) for layer in range(3)])


@pytest.mark.parametrize("num_experts", [128, 300])
def test_an_array_is_read_back_by_the_name_in_its_metadata(num_experts):
    ids, store = layers_of_routes(num_experts=num_experts), MemoryStore()
    write(ids, num_experts, store=store, keep_order=True)
    np.testing.assert_array_equal(zarr.open_array(store, path="ids")[:], ids)


def test_a_part_of_an_array_is_read_from_its_chunks():
    ids = np.sort(layers_of_routes(), axis=-1)
    array = write(ids)
    np.testing.assert_array_equal(array[1:2, 70:150], ids[1:2, 70:150])


def test_missing_rows_and_whole_missing_chunks_are_zeros_again():
    ids = np.sort(layers_of_routes(), axis=-1)
    ids[0], ids[2, 100:130] = 0, 0
    np.testing.assert_array_equal(write(ids)[:], ids)


def test_the_last_chunk_is_filled_up_without_a_trace():
    ids = np.sort(layers_of_routes(rows=65), axis=-1)
    np.testing.assert_array_equal(write(ids)[:], ids)


def test_metadata_names_codec_version_and_shape():
    store = MemoryStore()
    write(layers_of_routes(), store=store)
    metadata = json.loads(store._store_dict["ids/zarr.json"].to_bytes())
    assert metadata["codecs"][0] == {
        "name": NAME,
        "configuration": {"version": 1, "num_experts": 128, "keep_order": False},
    }


def test_settings_survive_their_metadata():
    codec = ExpertSetCodec(300, keep_order=True)
    assert ExpertSetCodec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "1"},
        {"level": 3},
        {"num_experts": 0},
        {"num_experts": True},
        {"num_experts": 65537},
        {"keep_order": 1},
    ],
)
def test_other_versions_and_settings_are_refused(changes):
    metadata = ExpertSetCodec(128).to_dict()
    metadata["configuration"] |= changes
    with pytest.raises(ArchiveCorrupt):
        ExpertSetCodec.from_dict(metadata)


@pytest.mark.parametrize("metadata", [{"name": NAME}, {"name": NAME, "configuration": {}}, {"name": "other"}])
def test_metadata_without_settings_is_refused(metadata):
    with pytest.raises(ArchiveCorrupt):
        ExpertSetCodec.from_dict(metadata)


def test_an_array_of_another_dtype_is_refused():
    with pytest.raises(RoutingMismatch, match="uint8"):
        write(layers_of_routes().astype(np.uint16))


def test_chunks_that_cut_rows_are_refused():
    with pytest.raises(RoutingMismatch, match="whole rows"):
        zarr.create_array(
            MemoryStore(), shape=(1, 9, 8), chunks=(1, 9, 4), dtype="uint8", serializer=ExpertSetCodec(128)
        )


def test_routes_of_another_model_are_refused_when_written():
    with pytest.raises(RoutingMismatch, match="names experts"):
        write(layers_of_routes(), num_experts=64)


def test_a_damaged_chunk_is_refused():
    store = MemoryStore()
    write(layers_of_routes(), store=store)
    key = "ids/c/1/0/0"
    data = store._store_dict[key].to_bytes()
    codec = ExpertSetCodec(64)
    assert codec != ExpertSetCodec(128)
    store._store_dict[key] = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(data[:-9] + data[-8:])
    with pytest.raises(ValueError):
        zarr.open_array(store, path="ids")[1]


def test_archives_can_be_listed_without_the_compiler():
    code = "import sys, moe_replay.archive.codec; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
