"""Our own exports: back as the same routes, and never read when they are damaged."""

import json
import zipfile
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import pytest
from archive_samples import batches, make_trace, origin_of, same
from exchange_samples import MODEL, NEWER, TRACES, archive_of, fresh_store, imported, sequences_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moe_replay.archive.routes import RouteArchive
from moe_replay.errors import ArchiveCorrupt, ConfigError, ReplayError
from moe_replay.exchange.export_reading import open_export
from moe_replay.exchange.exporting import EXPORT_FORMATS, export_routes
from moe_replay.routing.trace import RoutingTrace


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@settings(max_examples=8, deadline=None)
@given(batch=batches(), chunk_tokens=st.sampled_from([1, 5, 65536]))
def test_an_export_comes_back_as_the_same_routes(tmp_path_factory, form, batch, chunk_tokens):
    origin, traces = batch
    file = tmp_path_factory.mktemp("export") / f"routes.{form}"
    archive = archive_of(traces, origin, chunk_tokens)
    export_routes(archive, file, form)
    back = imported(file)
    assert back.token_digests == archive.token_digests
    assert all(same(a, b) for a, b in zip(sequences_of(back), traces, strict=True))


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0], [9, 0]])
def test_sequences_without_tokens_come_back(tmp_path, form, lengths):
    traces, file = [make_trace(n) for n in lengths], tmp_path / f"routes.{form}"
    export_routes(archive_of(traces, origin_of()), file, form)
    assert [trace.num_tokens for trace in sequences_of(imported(file))] == lengths


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_an_export_keeps_where_its_routes_come_from(tmp_path, form):
    archive, file = archive_of(TRACES), tmp_path / f"routes.{form}"
    export_routes(archive, file, form)
    back = imported(file)
    tokens = slice(0, archive.num_tokens)
    assert back.origins_of(tokens) == archive.origins_of(tokens)
    assert {origin for _, origin in back.origins_of(tokens)} == {origin_of(), NEWER}
    assert back.provenance.padded_rows == 6
    note = back.artifact.commit.attributes
    assert (note["exported_run_id"], note["exported_iteration"], note["imported_file"]) == ("run-1", 3, file.name)
    assert str(tmp_path) not in back.artifact.commit.to_bytes().decode()


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_the_order_of_experts_survives_where_it_was_kept(tmp_path, form):
    file = tmp_path / f"routes.{form}"
    export_routes(archive_of(TRACES, keep_order=True), file, form)
    back = imported(file)
    assert back.provenance.order == "engine"
    assert [t.ids_TLK.tolist() for t in sequences_of(back)] == [t.ids_TLK.tolist() for t in TRACES]


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_some_layers_alone_can_be_exported(tmp_path, form):
    file = tmp_path / f"routes.{form}"
    export_routes(archive_of(TRACES), file, form, layers=[5, 1])
    back = imported(file)
    assert back.layers == (1, 5)
    assert all(same(a, b.select_layers([1, 5])) for a, b in zip(sequences_of(back), TRACES, strict=True))


def test_layers_that_an_archive_lacks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"layers \[0, 3\]; it has \(1, 2, 5\)"):
        export_routes(archive_of(TRACES), tmp_path / "routes.npz", "npz", layers=[0, 1, 3])


def test_exports_are_read_by_the_libraries_of_their_formats(tmp_path):
    archive, whole = archive_of(TRACES, keep_order=True), RoutingTrace.concatenate(TRACES)
    files = {form: tmp_path / f"routes.{form}" for form in EXPORT_FORMATS}
    for form, file in files.items():
        export_routes(archive, file, form)
    with np.load(files["npz"], allow_pickle=False) as npz:
        arrays = dict(npz)
    assert json.loads(arrays.pop("moe_replay").item())["provenance"]["run_id"] == "run-1"
    tensors = load_file(files["safetensors"])
    for found in (arrays, tensors):
        assert np.array_equal(found["ids"], whole.ids_TLK)
        assert np.array_equal(found["valid"], whole.valid_T)
        assert found["offsets"].tolist() == [0, 7, 8, 20, 25]
        assert [row.tobytes() for row in found["token_digests"]] == archive.token_digests
    rows = pq.read_table(files["parquet"]).to_pylist()
    assert [row["tokens"] for row in rows] == [7, 1, 12, 5]
    shape = (12, 3, 4)
    assert np.array_equal(np.frombuffer(rows[2]["routes"], np.uint8).reshape(shape), TRACES[2].ids_TLK)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_damage_to_an_export_is_imported_silently(tmp_path_factory, form, data):
    file = tmp_path_factory.mktemp("damaged") / f"routes.{form}"
    archive = archive_of(TRACES)
    export_routes(archive, file, form)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file.write_bytes(content)
    store = fresh_store()
    try:
        back = imported(file, store)
    except ReplayError:
        assert not store.exists()
        return
    tokens = slice(0, archive.num_tokens)
    assert back.origins_of(tokens) == archive.origins_of(tokens)
    assert back.token_digests == archive.token_digests
    assert all(same(a, b) for a, b in zip(sequences_of(back), TRACES, strict=True))


def test_a_file_that_exists_is_kept_unless_told_otherwise(tmp_path):
    file, archive = tmp_path / "routes.npz", archive_of(TRACES)
    file.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_routes(archive, file, "npz")
    assert file.read_bytes() == b"mine"
    export_routes(archive, file, "npz", overwrite=True)
    assert imported(file).num_tokens == 25
    assert list(tmp_path.iterdir()) == [file]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    archive = archive_of(TRACES)

    def fail(*_):
        raise ArchiveCorrupt("an object is damaged")

    monkeypatch.setattr(RouteArchive, "read", fail)
    for form in EXPORT_FORMATS:
        with pytest.raises(ArchiveCorrupt, match="an object is damaged"):
            export_routes(archive, tmp_path / f"routes.{form}", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_an_export_is_written_a_chunk_at_a_time(tmp_path, monkeypatch, form):
    archive = archive_of([make_trace(10, seed=i) for i in range(12)], origin_of())
    read, most = RouteArchive.read, []

    def watched(self, tokens, layers=None):
        most.append(tokens.stop - tokens.start)
        return read(self, tokens, layers)

    monkeypatch.setattr(RouteArchive, "read", watched)
    export_routes(archive, tmp_path / "routes", form)
    assert most == [8] * 15


def test_pickled_arrays_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    export_routes(archive_of(TRACES), tmp_path / "whole.npz", "npz")
    with np.load(tmp_path / "whole.npz") as whole:
        arrays = dict(whole)
    for name in arrays:
        np.savez(tmp_path / "routes.npz", **{**arrays, name: np.array([Harm()], dtype=object)})
        with pytest.raises(ArchiveCorrupt, match=f"{name}.npy holds object"):
            imported(tmp_path / "routes.npz")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("about", [np.array(7), np.array(["{}", "{}"]), np.array(b"{}")])
def test_an_npz_that_names_itself_with_no_text_is_refused(tmp_path, about):
    np.savez(tmp_path / "routes.npz", moe_replay=about)
    with pytest.raises(ArchiveCorrupt, match=r"moe_replay.npy holds .* expected one text"):
        imported(tmp_path / "routes.npz")


def test_no_damage_to_the_header_of_an_npz_member_escapes_as_an_error_of_a_library(tmp_path):
    file = tmp_path / "routes.npz"
    export_routes(archive_of(TRACES), file, "npz")
    content = bytearray(file.read_bytes())
    start = content.rindex(b"\x93NUMPY")
    for bit in range(8 * start, 8 * (start + 128)):
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        with suppress(ArchiveCorrupt):
            open_export(file)


def test_a_header_of_an_npz_member_that_is_nested_without_end_is_refused(tmp_path):
    header = (b"-" * 9000 + b"1").ljust(9500)
    with zipfile.ZipFile(tmp_path / "routes.npz", "w") as file:
        file.writestr("moe_replay.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ArchiveCorrupt, match=r"moe_replay.npy has a header that is nested too deeply"):
        imported(tmp_path / "routes.npz")


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize("content", [b"", b"no such thing", bytes(4096)])
def test_a_file_that_is_no_export_at_all_is_a_wrong_name_and_no_damage(tmp_path, form, content):
    file = tmp_path / f"routes.{form}"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"neither an export nor a dump .* read as {form}"):
        imported(file)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_damage_within_an_export_is_called_so(tmp_path, form):
    file = tmp_path / f"routes.{form}"
    export_routes(archive_of(TRACES), file, form)
    content = bytearray(file.read_bytes())
    content[{"parquet": 380, "safetensors": -1, "npz": 200}[form]] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArchiveCorrupt, match="export it again"):
        imported(file)


def test_options_on_the_origin_are_refused_for_an_export(tmp_path):
    export_routes(archive_of(TRACES), tmp_path / "routes.npz", "npz")
    with pytest.raises(ConfigError, match="export of run run-1"):
        imported(tmp_path / "routes.npz", model=MODEL)
