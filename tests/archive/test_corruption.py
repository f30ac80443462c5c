"""Whatever happens to a stored archive, a reader gets the right routes or an error that names what is wrong."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import pytest
import zarr
from archive_samples import DIGEST, digests_of, make_trace, origin_of, same
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.commits import Commit, StoredObject, sha256_hex
from moe_replay.archive.routes import RouteArchive, verify_routes, write_routes
from moe_replay.errors import ArchiveCorrupt, RoutingMismatch
from moe_replay.routing.trace import RoutingTrace

MODEL = (16, 4, (1, 2, 5))
TRACES = [make_trace(n, seed=n, missing=(n - 1,)) for n in (7, 1, 12, 5)]
OTHER_TRACES = [make_trace(n, seed=n + 50, missing=(n - 1,)) for n in (7, 1, 12, 5)]
ROLLOUT = ArtifactRef(uri="iterations/00000/rollout", sha256="a" * 64)
COMMIT = "_committed.json"
CHUNK = 13
UNREAD = {"_timing.json"}
CODECS = ["zstd", "expert-set"]


@dataclasses.dataclass
class Stored:
    """An archive on disk: where, the reference to it, and its files as they were written."""

    root: Path
    ref: ArtifactRef
    files: dict[str, bytes]

    @property
    def folder(self) -> Path:
        return self.root / "run-1" / self.ref.uri

    @property
    def objects(self) -> list[str]:
        return sorted(set(self.files) - UNREAD)

    def put(self, files: Mapping[str, bytes | None]) -> None:
        """Change files (None removes one) of the pristine archive, and nothing else."""
        for name in self._changed | files.keys():
            path, data = self.folder / name, files.get(name, self.files.get(name))
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        self._changed = set(files)

    _changed: set[str] = dataclasses.field(default_factory=set)


def stored(root, traces=TRACES, run_id="run-1", iteration=0, origin=None, codec="zstd", rollout=ROLLOUT) -> Stored:
    store = RunStore(str(root), run_id)
    writer = store.begin("routes", iteration, {"rollout": rollout}, DIGEST)
    sequences = zip(traces, digests_of(traces), strict=True)
    write_routes(writer, sequences, origin or origin_of(), CHUNK, codec)
    ref = writer.commit()
    folder = root / run_id / ref.uri
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return Stored(root, ref, files)


@pytest.fixture(scope="module", params=CODECS)
def archive(request, tmp_path_factory) -> Stored:
    return stored(tmp_path_factory.mktemp("archive"), codec=request.param)


@pytest.fixture
def pristine(archive) -> Iterator[Stored]:
    yield archive
    archive.put({})


def read_as_training(archive: Stored, ref: ArtifactRef | None) -> list[RoutingTrace]:
    """Every route, with the checks that a reader makes who knows what he wants; `ref` or whatever is committed."""
    store = RunStore(str(archive.root), "run-1")
    found = ref or store.commit_of("routes", 0)
    if found is None:
        raise ArchiveCorrupt(f"{COMMIT}: there is no archive")
    opened = RouteArchive.open(store.open(found))
    opened.require_model(*MODEL)
    opened.require_rollout(ROLLOUT)
    opened.require_tokens(digests_of(TRACES))
    return opened.read_sequences(0, opened.num_sequences)


def refusals(archive: Stored) -> list[str]:
    """Messages of reads with and without the reference; a read that succeeds must be right."""
    messages = []
    for ref in (archive.ref, None):
        try:
            read = read_as_training(archive, ref)
        except (ArchiveCorrupt, RoutingMismatch) as error:
            messages.append(str(error))
        else:
            assert len(read) == len(TRACES)
            assert all(same(a, b) for a, b in zip(read, TRACES, strict=True)), "a wrong route was read"
    return messages


def assert_refused(archive: Stored, *names: str) -> None:
    messages = refusals(archive)
    assert len(messages) == 2, f"damage to {names} was read silently"
    assert all(any(name in message for name in names) for message in messages), messages


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_the_undamaged_archive_is_read(pristine):
    assert refusals(pristine) == []


def test_every_object_is_missed_when_truncated_extended_or_removed(pristine):
    for name in pristine.objects:
        data = pristine.files[name]
        for damaged in (None, b"", data[:-1], data + b"\0", bytes(len(data))):
            pristine.put({name: damaged})
            assert_refused(pristine, name)


def test_every_object_is_missed_when_a_bit_of_its_ends_or_middle_flips(pristine):
    for name in pristine.objects:
        data = pristine.files[name]
        for bit in {0, 7, 4 * len(data), 8 * len(data) - 8, 8 * len(data) - 1}:
            pristine.put({name: flipped(data, bit)})
            assert_refused(pristine, name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bits_in_any_objects_are_refused(archive, data):
    damaged: dict[str, bytes] = {}
    for name in data.draw(st.lists(st.sampled_from(archive.objects), min_size=1, max_size=3, unique=True)):
        bits = data.draw(st.sets(st.integers(0, 8 * len(archive.files[name]) - 1), min_size=1, max_size=4))
        content = archive.files[name]
        for bit in bits:
            content = flipped(content, bit)
        damaged[name] = content
    archive.put(damaged)
    assert_refused(archive, *damaged)
    archive.put({})


@pytest.mark.slow
def test_every_byte_of_every_object_is_missed_when_a_bit_of_it_flips(pristine):
    for name in pristine.objects:
        data = pristine.files[name]
        for position in range(len(data)):
            pristine.put({name: flipped(data, 8 * position + position % 8)})
            assert_refused(pristine, name)


def test_swapped_objects_are_refused(pristine):
    for one, other in combinations(pristine.objects, 2):
        if pristine.files[one] != pristine.files[other]:
            pristine.put({one: pristine.files[other], other: pristine.files[one]})
            assert_refused(pristine, one, other)


def test_what_lies_beside_the_archive_is_not_read(pristine):
    pristine.put({name: b"\xff not json" for name in ("_timing.json", "_attempt.json", "routes/ids/c/9/9/9", "x")})
    assert refusals(pristine) == []


def others(root: Path, codec: str) -> dict[str, Stored]:
    """Archives that are whole in themselves, and not the one wanted."""
    elsewhere = ArtifactRef(uri=ROLLOUT.uri, sha256="b" * 64)
    layers = (1, 2, 6)
    moved = [dataclasses.replace(trace, layers=layers) for trace in TRACES]
    shorter = TRACES[:3]
    return {
        "other routes": stored(root / "routes", OTHER_TRACES, codec=codec),
        "another run": stored(root / "run", run_id="run-2", codec=codec),
        "another iteration": stored(root / "iteration", iteration=1, codec=codec),
        "another layer map": stored(root / "layers", moved, origin=origin_of(layers=layers), codec=codec),
        "another rollout": stored(root / "rollout", OTHER_TRACES, rollout=elsewhere, codec=codec),
        "fewer sequences": stored(root / "shorter", shorter, codec=codec),
        "other tokens": stored(root / "tokens", TRACES[::-1], codec=codec),
    }


def test_objects_of_another_archive_are_refused(pristine, tmp_path):
    codec = "zstd" if b'"zstd"' in pristine.files["routes/ids/zarr.json"] else "expert-set"
    for other in others(tmp_path, codec).values():
        for name in set(pristine.objects) & set(other.files):
            if other.files[name] != pristine.files[name]:
                pristine.put({name: other.files[name]})
                # Without a reference any commit may be the right one: then it is the objects or inputs that are wrong.
                assert_refused(pristine, name, *(["routes/", "holds routes of"] if name == COMMIT else []))


def test_another_archive_in_its_place_is_refused_though_it_is_whole(pristine, tmp_path):
    for what, other in others(tmp_path, "zstd").items():
        pristine.put({**dict.fromkeys(pristine.files), **other.files})
        with pytest.raises(ArchiveCorrupt, match=COMMIT):
            read_as_training(pristine, pristine.ref)
        if what != "other routes":  # without a reference nothing tells them from those that were captured
            with pytest.raises((ArchiveCorrupt, RoutingMismatch), match=r"belongs elsewhere|holds routes of"):
                read_as_training(pristine, None)


def test_a_commit_with_the_objects_of_a_later_attempt_is_refused_and_the_reverse(pristine, tmp_path):
    later = stored(tmp_path, OTHER_TRACES)
    pristine.put({name: data for name, data in later.files.items() if name != COMMIT})
    assert_refused(pristine, "routes/")
    pristine.put({COMMIT: later.files[COMMIT]})
    assert_refused(pristine, COMMIT, "routes/")


def forged(archive: Stored, change: Callable[[dict[str, bytes]], None]) -> None:
    """Damage objects as a writer would that then commits them with right sizes and checksums."""
    files = dict(archive.files)
    change(files)
    committed = Commit.from_bytes(files[COMMIT], COMMIT)
    objects = tuple(
        StoredObject(path=name, size=len(files[name]), sha256=sha256_hex(files[name]))
        for name in sorted(files)
        if not name.startswith("_")
    )
    files[COMMIT] = committed.model_copy(update={"objects": objects}).to_bytes()
    archive.put({**dict.fromkeys(archive.files), **files})


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_flips_under_right_checksums_never_give_a_wrong_route(archive, data):
    name = data.draw(st.sampled_from([name for name in archive.objects if name != COMMIT]))
    bit = data.draw(st.integers(0, 8 * len(archive.files[name]) - 1))
    forged(archive, lambda files: files.update({name: flipped(files[name], bit)}))
    try:
        read = read_as_training(archive, None)
    except (ArchiveCorrupt, RoutingMismatch):
        pass
    else:
        assert name.endswith("zarr.json")
        assert all(same(a, b) for a, b in zip(read, TRACES, strict=True))
    archive.put({})


def rewritten(archive: Stored, root: Path, change: Callable[[zarr.Group], None]) -> list[str]:
    """What `verify_routes` finds in an archive whose content was changed before it was committed anew."""
    shutil.copytree(archive.folder / "routes", root / "routes")
    change(zarr.open_group(root / "routes", mode="r+"))
    store = RunStore(str(root), "run-1")
    writer = store.begin("routes", 0, {"rollout": ROLLOUT}, DIGEST)
    for path in (root / "routes").rglob("*"):
        if path.is_file():
            writer.write_bytes(str(path.relative_to(root)), path.read_bytes())
    artifact = store.open(writer.commit())
    problems = verify_routes(artifact)
    assert problems or all(
        same(a, b) for a, b in zip(RouteArchive.open(artifact).read_sequences(0, 4), TRACES, strict=True)
    )
    return problems


def set_provenance(**changes):
    def change(group):
        group.attrs["provenance"] = json.loads(json.dumps({**group.attrs["provenance"], **changes}))

    return change


def set_origin(**changes):
    return lambda group: set_provenance(origins=[{**group.attrs["provenance"]["origins"][0], **changes}])(group)


def set_row_group(number, **changes):
    def change(group):
        groups = list(group.attrs["provenance"]["row_groups"])
        groups[number] = {**groups[number], **changes}
        set_provenance(row_groups=groups)(group)

    return change


WHOLE = {"first_token": 0, "tokens": 25, "captured_rows": 21, "missing_rows": 4, "padded_rows": 0, "origin": 0}


def set_row_groups(groups):
    return set_provenance(row_groups=groups)


def set_array(name, index, value):
    def change(group):
        group[name][index] = value

    return change


def resize(name, *shape):
    return lambda group: group[name].resize(shape)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (set_provenance(run_id="another-run"), "routes are of run another-run"),
        (set_provenance(iteration=1), "iteration 1, its commit of run run-1, iteration 0"),
        (set_provenance(unknown=1), "unknown"),
        (set_provenance(order="random"), "order"),
        (set_provenance(origins=[]), "origins"),
        (set_row_groups([]), "row_groups|shape"),
        (set_origin(layers=[1, 2]), "shape"),
        (set_origin(layers=[2, 1, 5]), "layer map"),
        (set_origin(num_experts=512), "uint16"),
        (set_origin(num_experts=8), "expert"),
        (set_origin(top_k=3), "shape"),
        (set_origin(weights_sha256="0" * 63), "weights_sha256"),
        (set_row_group(0, captured_rows=13, missing_rows=0), "11 of 13 rows from token 0 on are valid"),
        (set_row_group(0, captured_rows=13), "13 captured and 2 missing rows are not 13 tokens"),
        (set_row_group(1, first_token=9), "starts at token 9"),
        (set_row_group(1, origin=1), "origin 1"),
        (set_row_group(1, tokens=11, captured_rows=9), "shape"),
        (set_row_groups([WHOLE]), "row group 0 of 25 tokens crosses a chunk of 13"),
        (set_array("offsets", 1, 9), "smallest step of -1"),
        (set_array("offsets", 0, 1), "go from 1"),
        (set_array("offsets", 4, 24), "go from 0 to 24"),
        (set_array("valid", 6, True), "valid|twice"),
        (set_array("valid", 5, False), "marked missing"),
        (resize("valid", 24), "valid is bool of shape"),
        (resize("offsets", 4), "offsets is int64 of shape"),
        (resize("token_digests", 3, 16), "offsets is int64 of shape"),
        (resize("token_digests", 4, 15), "token_digests"),
        (resize("ids", 2, 25, 4), "ids is uint8 of shape"),
        (resize("ids", 4, 25, 4), "does not name routes/ids/c/3/0/0"),
        (lambda group: group.attrs.update({"format_version": 2}), "format is .*2"),
        (lambda group: group.attrs.update({"format": "else"}), "format is .*else"),
        (lambda group: group.store.root.joinpath("ids/c/1/1/0").unlink(), "does not name routes/ids/c/1/1/0"),
    ],
)
def test_an_archive_that_breaks_an_invariant_is_refused(archive, tmp_path, change, found):
    (problem,) = rewritten(archive, tmp_path, change)
    assert re.search(found, problem), problem


@pytest.mark.parametrize(
    ("row", "found"),
    [([3, 3, 3, 3], "twice"), ([1, 2, 3, 16], "names expert 16 of 16"), ([0, 0, 0, 0], "twice"), ([4, 3, 2, 1], "asc")],
)
def test_routes_that_no_router_gives_are_refused(tmp_path, row, found):
    (problem,) = rewritten(stored(tmp_path / "a"), tmp_path / "b", set_array("ids", (1, 4), row))
    assert found in problem


def test_the_rewritten_archive_itself_is_sound(archive, tmp_path):
    assert rewritten(archive, tmp_path, set_provenance()) == []


def test_a_codec_that_the_format_does_not_know_is_refused(tmp_path):
    def recompress(group):
        ids = group["ids"][:]
        group.create_array("ids", data=ids, chunks=(1, CHUNK, 4), compressors=[zarr.codecs.GzipCodec()], overwrite=True)

    (problem,) = rewritten(stored(tmp_path / "a"), tmp_path / "b", recompress)
    assert "has the codecs ('bytes', 'gzip')" in problem


def test_a_commit_of_another_stage_is_refused(tmp_path):
    original = stored(tmp_path / "a")
    store = RunStore(str(tmp_path / "b"), "run-1")
    writer = store.begin("training", 0, {}, DIGEST)
    for name in original.objects:
        if name != COMMIT:
            writer.write_bytes(name, original.files[name])
    with pytest.raises(ArchiveCorrupt, match="committed by stage 'training'"):
        RouteArchive.open(store.open(writer.commit()))


def test_a_range_is_refused_only_when_its_own_chunks_are_damaged(pristine):
    pristine.put({"routes/ids/c/1/1/0": b"", "routes/valid/c/1": b""})
    opened = RouteArchive.open(RunStore(str(pristine.root), "run-1").open(pristine.ref))
    whole = RoutingTrace.concatenate(TRACES)
    assert same(opened.read(slice(0, 13), slice(2, 3)), whole.slice_tokens(0, 13).select_layers([5]))
    for tokens, layers, name in [(slice(9, 14), slice(1, 2), "ids/c/1/1/0"), (slice(24, 25), slice(0, 1), "valid/c/1")]:
        with pytest.raises(ArchiveCorrupt, match=name):
            opened.read(tokens, layers)
