"""Dumps of vLLM, SGLang and verl, and the runs that hold what is imported."""

import base64
import json
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import same
from exchange_samples import MODEL, TOLD, fresh_store, imported, sequences_of
from safetensors.numpy import save_file

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.routes import token_digest
from moe_replay.errors import ConfigError, ReplayError, RoutingMismatch
from moe_replay.exchange.foreign_routes import ModelShape
from moe_replay.exchange.importing import ToldOrigin, import_routes
from moe_replay.routing.trace import RoutingTrace


def capture(num_rows, seed=0, layers=3, dense=(0,)):
    """Rows of an engine for all decoder layers, zeros in the dense ones: int64 [rows, layers, 4] of 16 experts."""
    ids_RDK = np.random.default_rng(seed).random((num_rows, layers, 16)).argsort(-1)[..., :4]
    ids_RDK[:, list(dense)] = 0
    return ids_RDK


def base64_of(ids_RDK) -> str:
    return base64.b64encode(ids_RDK.astype("<i4").tobytes()).decode()


def jsonl(tmp_path, *rows):
    file = tmp_path / "routes.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def line(num_tokens=6, num_rows=None, seed=0, **changes):
    rows = capture(num_tokens - 1 if num_rows is None else num_rows, seed)
    return {"token_ids": list(range(10, 10 + num_tokens)), "routed_experts": rows.tolist(), **changes}


@pytest.mark.parametrize("num_rows", [5, 6])
@pytest.mark.parametrize("form", ["vllm", "vllm, layers with experts alone", "sglang"])
def test_dumps_of_engines_are_read(tmp_path, form, num_rows):
    rows = capture(num_rows)
    routes = base64_of(rows) if form == "sglang" else (rows if form == "vllm" else rows[:, 1:]).tolist()
    archive = imported(jsonl(tmp_path, line(routed_experts=routes)), model=MODEL, told=TOLD)
    (trace,) = sequences_of(archive)
    assert same(trace, RoutingTrace.from_capture(rows[:, 1:], 6, 16, (1, 2)))
    assert archive.token_digests == [token_digest(range(10, 16))]
    assert (archive.provenance.captured_rows, archive.provenance.missing_rows) == (num_rows, 6 - num_rows)
    origin = archive.provenance.origins[0]
    assert (origin.source, origin.engine_version, origin.dtype, origin.weights_sha256) == (
        "sglang",
        "0.5.6",
        "unknown",
        None,
    )


def test_layers_and_experts_alone_describe_a_model_for_lists(tmp_path):
    archive = imported(jsonl(tmp_path, line(), line(seed=1)), model=ModelShape((1, 2), 16))
    assert (archive.provenance.top_k, archive.num_sequences) == (4, 2)


@pytest.mark.parametrize(
    ("named", "in_dump", "taken"),
    [((0, 1, 2), 3, True), ((1, 2), 3, True), ((1, 2), 2, True), ((0, 1, 2), 4, False), ((1, 2), 4, False)],
)
def test_layers_alone_leave_no_layer_of_a_dump_unaccounted_for(tmp_path, named, in_dump, taken):
    file = jsonl(tmp_path, line(routed_experts=capture(5, layers=in_dump, dense=()).tolist()))
    if taken:
        assert imported(file, model=ModelShape(named, 16)).layers == named
        return
    with pytest.raises(RoutingMismatch, match=rf"cover 4 layers; .* the {len(named)} MoE .* all 3 decoder layers"):
        imported(file, model=ModelShape(named, 16))


def test_a_model_accounts_for_dense_layers_at_its_end(tmp_path):
    file = jsonl(tmp_path, line(routed_experts=capture(5, layers=4, dense=(0, 3)).tolist()))
    assert imported(file, model=MODEL._replace(decoder_layers=4)).layers == (1, 2)


WRONG_LINES = {
    "a row too few": (line(num_rows=4), "routes cover 4 rows but the sequence has 6 tokens"),
    "a row too many": (line(num_rows=7), "routes cover 7 rows but the sequence has 6 tokens"),
    "an expert that is none": (line(routed_experts=(capture(5) * 5).tolist()), "the model has experts 0 to 15"),
    "a negative expert": (line(routed_experts=(capture(5) - 1).tolist()), "ids span -1 to"),
    "an expert twice": (line(routed_experts=(capture(5) // 4).tolist()), "names an expert twice"),
    "rows never captured": (line(routed_experts=np.zeros((5, 3, 4), int).tolist()), "names an expert twice"),
    "other layers": (line(routed_experts=capture(5, layers=4).tolist()), "cover 4 layers; expected the 2 MoE layers"),
    "other top-k": (line(routed_experts=capture(5)[..., :3].tolist()), "name 3 experts per token, the model has 4"),
    "ragged rows": (line(routed_experts=[[[1, 2]], [[1]]]), "lists of unequal lengths"),
    "numbers that are no integers": (line(routed_experts=[[[0.5]]]), "float64 of shape (1, 1, 1); expected integers"),
    "flat lists": (line(routed_experts=[1, 2, 3]), "shape (3,); expected [rows, layers, experts per token]"),
    "cut base64": (line(routed_experts=base64_of(capture(5))[:-3]), "no base64 of int32"),
    "base64 of too few": (line(routed_experts=base64_of(capture(4))), "48 ids are not those of 5 or 6 rows of 3"),
    "no routes": ({"token_ids": [1]}, "has no routed_experts (its fields are token_ids)"),
    "null for routes": (line(routed_experts=None), "has null for routed_experts"),
    "null for routes and no tokens": ({"routed_experts": None}, "has no token_ids and has null for routed_experts"),
    "no tokens": (line(token_ids=[]), "token_ids have shape (0,)"),
    "tokens that are words": (line(token_ids=["a", "b"]), "expected integers"),
    "a list": ([1, 2], "holds a list"),
    "no JSON": ('{"token_ids": [1', "it is not JSON"),
    "lists without end": ("[" * 200_000, "it is not JSON that can be read"),
}


@pytest.mark.parametrize("wrong", WRONG_LINES)
def test_a_damaged_line_is_refused_with_its_number_and_leaves_no_run(tmp_path, wrong):
    row, told = WRONG_LINES[wrong]
    store = fresh_store()
    with pytest.raises(RoutingMismatch) as caught:
        imported(jsonl(tmp_path, line(), row), store, model=MODEL)
    assert str(caught.value).startswith("line 2 of routes.jsonl: ")
    assert told in str(caught.value)
    assert not store.exists()


def test_a_capture_that_was_never_written_is_refused(tmp_path):
    same_row = np.broadcast_to(capture(1), (99, 3, 4)).tolist()
    with pytest.raises(RoutingMismatch, match="all 99 captured tokens have the same routes"):
        imported(jsonl(tmp_path, line(100, routed_experts=same_row)), model=MODEL)


def test_a_capture_that_stops_working_late_is_still_refused_by_its_rows(tmp_path):
    whole = line(5000, seed=1)
    dead = line(200, routed_experts=np.zeros((199, 3, 4), int).tolist())
    with pytest.raises(RoutingMismatch, match=r"line 2 .* names an expert twice"):
        imported(jsonl(tmp_path, whole, dead), model=MODEL)


def test_base64_needs_a_model(tmp_path):
    with pytest.raises(ConfigError, match="--model"):
        imported(jsonl(tmp_path, line(routed_experts=base64_of(capture(5)))), model=ModelShape((1, 2), 16))


def verl_batch(tmp_path, **changes):
    """Two sequences: prompts of 2 and 3 tokens padded left to 4, responses of 3 and 1 padded right to 4."""
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0, 0]], dtype=np.int64)
    routes = np.zeros((2, 8, 3, 4), dtype=np.int16)
    routes[0, 2:6], routes[1, 1:4] = capture(4, 1), capture(3, 2)
    tokens = np.arange(16).reshape(2, 8) * mask
    tensors = {"routed_experts": routes, "input_ids": tokens, "attention_mask": mask, **changes}
    file = tmp_path / "batch.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    return file


def test_a_padded_batch_of_verl_is_read_without_its_padding(tmp_path):
    archive = imported(verl_batch(tmp_path), model=MODEL)
    expected = [
        RoutingTrace.from_capture(capture(rows, seed)[:, 1:], rows + 1, 16, (1, 2)) for rows, seed in ((4, 1), (3, 2))
    ]
    assert all(same(a, b) for a, b in zip(sequences_of(archive), expected, strict=True))
    assert archive.token_digests == [token_digest([2, 3, 4, 5, 6]), token_digest([9, 10, 11, 12])]
    provenance = archive.provenance
    assert (provenance.captured_rows, provenance.missing_rows, provenance.padded_rows) == (7, 2, 7)


BATCH_ROUTES = np.zeros((2, 8, 3, 4), dtype=np.int16)
WRONG_BATCHES = {
    "no routes at all": ({"routed_experts": BATCH_ROUTES}, "sequence 0 of batch.safetensors: all 5 rows are zeros"),
    "another mask": ({"attention_mask": np.eye(2, 8, dtype=np.int64)}, "rows of padding name experts"),
    "other lengths": ({"input_ids": np.zeros((2, 7), np.int64)}, "input_ids (2, 7)"),
    "an empty sequence": ({"attention_mask": np.zeros((2, 8), np.int64)}, "attention_mask is all 0"),
    "one expert": ({"routed_experts": BATCH_ROUTES[..., :1]}, "looks like expert 0"),
    "a missing tensor": ({"attention_mask": None}, "has no tensor attention_mask"),
}


@pytest.mark.parametrize("wrong", WRONG_BATCHES)
def test_a_damaged_batch_is_refused_with_numbers(tmp_path, wrong):
    changes, told = WRONG_BATCHES[wrong]
    store = fresh_store()
    changes = {name: None if tensor is None else np.ascontiguousarray(tensor) for name, tensor in changes.items()}
    with pytest.raises((RoutingMismatch, ConfigError)) as caught:
        imported(verl_batch(tmp_path, **changes), store, model=MODEL)
    assert told in str(caught.value)
    assert not store.exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("routes.pt", b"", "neither an export of moe-replay"),
        ("routes.jsonl", b"", "holds no sequence"),
        ("routes.jsonl", b"\xff\xfe", "not UTF-8"),
        ("routes.npz", b"PK", "can't be read as npz"),
        ("routes.safetensors", b"\x08", "can't be read as safetensors"),
        ("routes.parquet", b"PAR1", "can't be read as parquet"),
        ("missing.jsonl", None, "can't be read (No such file"),
    ],
)
def test_a_file_that_is_no_dump_is_refused(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ReplayError) as caught:
        imported(tmp_path / name, model=MODEL)
    assert told in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_a_foreign_file_is_said_to_be_no_export_before_any_option_is_asked_for(tmp_path, form):
    file = tmp_path / f"routes.{form}"
    if form == "npz":
        np.savez(file, ids=np.zeros(3))
    else:
        pq.write_table(pa.table({"ids": [1, 2]}), file)
    with pytest.raises(ConfigError, match="neither an export of moe-replay") as caught:
        imported(file)
    assert "--layers" not in str(caught.value)


def test_a_dump_without_its_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--model, or give --layers and --experts"):
        imported(jsonl(tmp_path, line()))


def test_a_digest_of_weights_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="weights_sha256: String should match"):
        imported(jsonl(tmp_path, line()), model=MODEL, told=ToldOrigin(weights_sha256="abc"))


def test_a_run_holds_imports_of_one_model_in_several_iterations(tmp_path):
    store = fresh_store()
    file = jsonl(tmp_path, line())
    for iteration in (0, 1):
        import_routes(store, iteration, file, MODEL)
    with pytest.raises(ConfigError, match="is committed"):
        import_routes(store, 1, file, MODEL)
    with pytest.raises(ConfigError, match="num_experts differ"):
        import_routes(store, 2, file, MODEL._replace(num_experts=17))


def test_nothing_is_imported_into_a_run_that_trains(tmp_path):
    store = fresh_store()
    store.create_run({"config": {"method": "r3"}})
    with pytest.raises(ConfigError, match="run imported is a run that trains; import into a new run id"):
        import_routes(store, 0, jsonl(tmp_path, line()), MODEL)
    assert store.commit_of("routes", 0) is None


def test_damage_is_found_whatever_was_imported_before(tmp_path):
    store = fresh_store()
    with pytest.raises(RoutingMismatch):
        import_routes(store, 0, jsonl(tmp_path, line(), line(num_rows=2)), MODEL)
    assert imported(jsonl(tmp_path, line(), line(seed=1)), store, model=MODEL).num_sequences == 2


@pytest.mark.parametrize("place", ["memory", "path"])
def test_an_import_that_is_refused_midway_removes_what_it_wrote(tmp_path, place):
    root = f"memory://{uuid.uuid4().hex}" if place == "memory" else str(tmp_path / "runs")
    store = RunStore(root, "imported")
    with pytest.raises(RoutingMismatch):
        import_routes(store, 0, jsonl(tmp_path, line(), line(num_rows=2)), MODEL)
    assert store.folder.files() == {}
    assert not (tmp_path / "runs" / "imported").exists()


def test_a_refused_import_leaves_what_was_imported_before(tmp_path):
    store = fresh_store()
    import_routes(store, 0, jsonl(tmp_path, line()), MODEL)
    before = store.folder.files()
    with pytest.raises(RoutingMismatch):
        import_routes(store, 1, jsonl(tmp_path, line(), line(num_rows=2)), MODEL)
    assert store.folder.files() == before
