"""Router evolution in a training artifact: what was recorded comes back, or an error that names what is wrong."""

import json
import tracemalloc
import uuid
from datetime import timedelta

import numpy as np
import pytest
import torch
from archive_samples import DIGEST
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_replay.archive.artifacts import ArtifactRef, RunStore
from moe_replay.archive.evolution import (
    EvolutionArchive,
    EvolutionOrigin,
    EvolutionWriter,
    has_evolution,
    verify_evolution,
)
from moe_replay.archive.evolution_writing import bfloat16_bits, bfloat16_floats
from moe_replay.archive.removal import remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.zarr_stores import VerifyingStore
from moe_replay.cli.archive import verify
from moe_replay.errors import ArchiveCorrupt, ConfigError, RoutingMismatch

ORIGIN = EvolutionOrigin(weights_sha256="0" * 64, layers=(1, 2, 5), num_experts=6, top_k=2, hidden_size=8, mini_steps=4)
ROWS, STEPS = 5, (2, 3, 4)
BEFORE = ("hidden", "old", "token", "group")


def sample_of(step, rows=ROWS, origin=ORIGIN, seed=0):
    """What both passes saw of the tokens sampled of one mini-step."""
    rng = np.random.default_rng((seed, step))
    num_layers = len(origin.layers)
    return {
        "hidden": rng.normal(size=(rows, num_layers, origin.hidden_size)).astype(np.float32),
        "old": rng.normal(size=(rows, num_layers, origin.num_experts)).astype(np.float32),
        "new": rng.normal(size=(rows, num_layers, origin.num_experts)).astype(np.float32),
        "token": step * 1000 + rng.permutation(1000)[:rows],
        "group": rng.integers(0, 4, rows),
    }


def write(store, samples, iteration=0, origin=ORIGIN, dtype="float32", also=()) -> ArtifactRef:
    writer = store.begin("training", iteration, {}, DIGEST)
    for path in also:
        writer.write_bytes(path, b"{}")
    rows = len(next(iter(samples.values()))["token"])
    evolution = EvolutionWriter(writer, origin, rows, tuple(sorted(samples)), dtype)
    for step, sample in samples.items():
        evolution.write_before(step, *(sample[name] for name in BEFORE))
    for step, sample in samples.items():
        evolution.write_after(step, sample["new"])
    evolution.close()
    return writer.commit()


def memory() -> RunStore:
    return RunStore(f"memory://{uuid.uuid4().hex}", "run-1")


def begun(rows=ROWS, steps=STEPS, dtype="float32") -> EvolutionWriter:
    return EvolutionWriter(memory().begin("training", 0, {}, DIGEST), ORIGIN, rows, steps, dtype)


@pytest.fixture
def store(tmp_path) -> RunStore:
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({"seed": 1})
    return store


@pytest.fixture
def artifact(store):
    return store.open(write(store, {step: sample_of(step) for step in STEPS}))


@pytest.fixture
def folder(store, artifact, tmp_path):
    return tmp_path / "run-1" / artifact.ref.uri / "evolution"


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_evolution_round_trips(data):
    num_experts = data.draw(st.integers(1, 9))
    kappa = data.draw(st.integers(1, 5))
    steps = data.draw(st.sets(st.integers(1, kappa), min_size=1))
    origin = EvolutionOrigin(
        weights_sha256="1" * 64,
        layers=tuple(sorted(data.draw(st.sets(st.integers(0, 60), min_size=1, max_size=3)))),
        num_experts=num_experts,
        top_k=data.draw(st.integers(1, num_experts)),
        hidden_size=data.draw(st.integers(1, 9)),
        mini_steps=kappa,
    )
    rows, told = data.draw(st.integers(1, 6)), data.draw(st.permutations(sorted(steps)))
    samples = {step: sample_of(step, rows, origin) for step in told}
    store = memory()
    opened = EvolutionArchive.open(store.open(write(store, samples, origin=origin)))
    assert (opened.provenance.origin, opened.layers, opened.num_tokens) == (origin, origin.layers, rows * len(steps))
    ordered = [samples[step] for step in sorted(steps)]
    assert opened.mini_step_S.tolist() == np.repeat(sorted(steps), rows).tolist()
    assert np.array_equal(opened.token_S, np.concatenate([sample["token"] for sample in ordered]))
    assert np.array_equal(opened.group_S, np.concatenate([sample["group"] for sample in ordered]))
    for position in range(len(origin.layers)):
        for found, name in zip(opened.read_layer(position), ("hidden", "old", "new"), strict=True):
            assert found.dtype == np.float32
            assert np.array_equal(found, np.concatenate([sample[name][:, position] for sample in ordered]))


def test_hidden_states_in_bfloat16_come_back_rounded_and_logits_exact():
    store, samples = memory(), {step: sample_of(step) for step in STEPS}
    opened = EvolutionArchive.open(store.open(write(store, samples, dtype="bfloat16")))
    hidden_SH, old_SE, _ = opened.read_layer(1)
    wanted = np.concatenate([samples[step]["hidden"][:, 1] for step in STEPS])
    assert np.array_equal(hidden_SH, torch.from_numpy(wanted).bfloat16().float().numpy())
    assert np.array_equal(old_SE, np.concatenate([samples[step]["old"][:, 1] for step in STEPS]))


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_rounding_to_bfloat16_is_that_of_torch(values):
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(bfloat16_floats(bfloat16_bits(values)).view(np.uint32), rounded.view(np.uint32))


def test_ties_round_to_even():
    halfway = np.array([0x3F808000, 0x3F818000, 0xBF808000], dtype=np.uint32).view(np.float32)
    assert bfloat16_bits(halfway).tolist() == [0x3F80, 0x3F82, 0xBF80]


def test_one_layer_is_read_without_the_others(artifact, monkeypatch):
    opened, read = EvolutionArchive.open(artifact), []
    get = VerifyingStore.get

    async def noting(self, key, prototype, byte_range=None):
        read.append(key)
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(VerifyingStore, "get", noting)
    opened.read_layer(1)
    chunks = {f"{name}/c/1/{step}/0" for name in ("hidden", "old_logits", "new_logits") for step in range(len(STEPS))}
    assert set(read) == chunks


def test_the_same_evolution_commits_the_same_bytes(tmp_path):
    stores = [RunStore(str(tmp_path / name), "run-1") for name in "ab"]
    refs = [write(store, {step: sample_of(step) for step in STEPS}, dtype="bfloat16") for store in stores]
    assert refs[0] == refs[1]


def test_writing_takes_the_memory_of_one_step(tmp_path):
    origin = ORIGIN.model_copy(update={"hidden_size": 512, "mini_steps": 12})
    writer = RunStore(str(tmp_path), "run-1").begin("training", 0, {}, DIGEST)
    evolution = EvolutionWriter(writer, origin, 200, tuple(range(1, 13)), "bfloat16")
    sample = sample_of(1, 200, origin)
    tracemalloc.start()
    for step in range(1, 13):
        tokens = sample["token"] + 1000 * step
        evolution.write_before(step, sample["hidden"], sample["old"], tokens, sample["group"])
        evolution.write_after(step, sample["new"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * sample["hidden"].nbytes


def test_chunks_of_zeros_are_stored_too():
    store, sample = memory(), sample_of(2)
    ref = write(store, {2: sample | {name: np.zeros_like(sample[name]) for name in ("hidden", "old", "new")}})
    assert verify_evolution(store.open(ref)) == []


def damages(data):
    flipped = bytearray(data)
    flipped[len(flipped) // 2] ^= 4
    return None, data[:-1], bytes(flipped), data + b"\0"


def test_every_damaged_object_is_refused_by_name(store, artifact, folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Metadata of arrays that lie side by side is read alike: one chunk row and one array of each kind is enough.
    chosen = [path for path in files if "c" not in path.parts or path.match("c/1/1/0") or path.match("c/2")]
    assert len(chosen) == 1 + 6 + 3 + 3
    for path in chosen:
        data = path.read_bytes()
        for damaged in damages(data):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ArchiveCorrupt, match=str(path.relative_to(folder))):
                EvolutionArchive.open(store.open(artifact.ref)).read_layer(1)
        path.write_bytes(data)
    assert verify_evolution(store.open(artifact.ref)) == []


def recommitted(store, artifact, folder, change) -> ArtifactRef:
    """The evolution as another iteration's, after `change(files)` and committed as a faulty writer would."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change(files)
    writer = store.begin("training", 1, {}, DIGEST)
    for path, data in files.items():
        writer.write_bytes(f"evolution/{path}", data)
    return writer.commit()


def edit(files, **changes):
    document = json.loads(files["zarr.json"])
    provenance = document["attributes"]["provenance"]
    provenance.update({"iteration": 1} | {key: changes[key] for key in changes if key in provenance})
    provenance["origin"].update({key: changes[key] for key in changes if key in provenance["origin"]})
    files["zarr.json"] = json.dumps(document).encode()


def drop(files, name):
    edit(files)
    del files[name]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda files: None, "are of run run-1, iteration 0"),
        (lambda files: drop(files, "hidden/c/1/2/0"), "does not name evolution/hidden/c/1/2/0"),
        (lambda files: drop(files, "token/zarr.json"), "array token can't be read"),
        (lambda files: edit(files, layers=[1, 2]), "its provenance says"),
        (lambda files: edit(files, layers=[2, 1, 5]), "provenance breaks the format: origin.layers"),
        (lambda files: edit(files, num_experts=7), "array old_logits is float32"),
        (lambda files: edit(files, dtype="bfloat16"), "array hidden is float32"),
        (lambda files: edit(files, sampled_steps=[2, 3, 5]), "not ascending, each once, of 1 to 4"),
        (lambda files: edit(files, sampled_steps=[1, 2, 3]), "mini_step is not 5 rows"),
        (lambda files: edit(files, rows_per_step=3, sampled_steps=[1, 2, 3, 4]), "its provenance says"),
    ],
)
def test_evolution_that_breaks_the_format_is_refused(store, artifact, folder, change, told):
    ref = recommitted(store, artifact, folder, change)
    with pytest.raises(ArchiveCorrupt, match=told):
        EvolutionArchive.open(store.open(ref))
    assert len(verify_evolution(store.open(ref))) == 1


def test_numbers_that_are_not_finite_are_refused_when_read():
    store, sample = memory(), sample_of(2)
    writer = store.begin("training", 0, {}, DIGEST)
    evolution = EvolutionWriter(writer, ORIGIN, ROWS, (2,), "bfloat16")
    evolution.write_before(2, *(sample[name] for name in BEFORE))
    evolution.write_after(2, sample["new"])
    # What a faulty writer would have let through.
    evolution._arrays["hidden"][2, 0, 0] = 0x7F80
    evolution.close()
    artifact = store.open(writer.commit())
    EvolutionArchive.open(artifact).read_layer(1)
    with pytest.raises(ArchiveCorrupt, match="hidden of decoder layer 5 holds 1 numbers that are not finite"):
        EvolutionArchive.open(artifact).read_layer(2)
    assert "not finite" in verify_evolution(artifact)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "told"), [("hidden", "hidden states"), ("old", "logits")])
def test_numbers_that_are_not_finite_are_refused_before_the_update(value, name, told):
    sample = sample_of(3)
    sample[name][2, 1, 0] = value
    with pytest.raises(RoutingMismatch, match=f"{told} of decoder layer 2 at mini-step 3"):
        begun().write_before(3, *(sample[name] for name in BEFORE))


def test_logits_that_are_not_finite_are_refused_after_the_update():
    sample = sample_of(3)
    sample["new"][0, 2, 1] = np.nan
    with pytest.raises(RoutingMismatch, match="logits of decoder layer 5 at mini-step 3 hold 1 numbers of 30"):
        begun().write_after(3, sample["new"])


def test_hidden_states_beyond_bfloat16_are_refused():
    sample = sample_of(3)
    sample["hidden"][0, 0, 0] = np.finfo(np.float32).max
    with pytest.raises(RoutingMismatch, match="bfloat16 hidden states of decoder layer 1"):
        begun(dtype="bfloat16").write_before(3, *(sample[name] for name in BEFORE))


@pytest.mark.parametrize("without", ["before", "after"])
def test_a_writer_that_misses_a_step_does_not_close(without):
    evolution = begun()
    for step in STEPS:
        sample = sample_of(step)
        if (step, without) != (3, "before"):
            evolution.write_before(step, *(sample[name] for name in BEFORE))
        if (step, without) != (3, "after"):
            evolution.write_after(step, sample["new"])
    with pytest.raises(RoutingMismatch, match=r"mini-steps \[3\] is not whole"):
        evolution.close()


def test_an_evolution_that_was_never_closed_is_refused():
    store = memory()
    writer = store.begin("training", 0, {}, DIGEST)
    EvolutionWriter(writer, ORIGIN, ROWS, STEPS, "float32").write_after(2, sample_of(2)["new"])
    with pytest.raises(ArchiveCorrupt, match="its format is"):
        EvolutionArchive.open(store.open(writer.commit()))


def change_of(name, value):
    return lambda sample: sample | {name: value(sample[name])}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_of("hidden", lambda it: it[:, :2]), r"shape \(5, 2, 8\), expected float32 of shape \(5, 3, 8\)"),
        (change_of("hidden", lambda it: it.astype(np.float16)), "hidden states of mini-step 2 are float16"),
        (change_of("old", lambda it: it[:4]), "expected float32 of"),
        (change_of("token", lambda it: it[:4]), "expected 5 integers"),
        (change_of("token", lambda it: it - 10_000), "from 0 on"),
        (change_of("token", lambda it: it // 1000), "sampled twice: 5 rows name 1"),
        (change_of("group", lambda it: it.astype(float)), "prompt groups of mini-step 2 are float64"),
    ],
)
def test_samples_of_another_shape_are_refused(change, told):
    with pytest.raises(RoutingMismatch, match=told):
        begun().write_before(2, *(change(sample_of(2))[name] for name in BEFORE))


def test_a_token_is_sampled_once():
    evolution, sample = begun(), sample_of(2)
    evolution.write_before(2, *(sample[name] for name in BEFORE))
    with pytest.raises(RoutingMismatch, match="5 of them seen in another mini-step"):
        evolution.write_before(3, *(sample[name] for name in BEFORE))


@pytest.mark.parametrize(("step", "told"), [(2, "was written already"), (1, r"none of those sampled, \(2, 3, 4\)")])
def test_a_step_is_written_once_and_only_if_sampled(step, told):
    evolution = begun()
    evolution.write_after(2, sample_of(2)["new"])
    with pytest.raises(RoutingMismatch, match=told):
        evolution.write_after(step, sample_of(step)["new"])


def test_a_layer_that_is_not_there_is_refused(artifact):
    with pytest.raises(RoutingMismatch, match="position from 0 to 2"):
        EvolutionArchive.open(artifact).read_layer(3)


def test_a_training_without_evolution_is_told_apart(store, artifact):
    writer = store.begin("training", 1, {}, DIGEST)
    writer.write_bytes("metrics.json", b"{}")
    assert has_evolution(artifact)
    assert not has_evolution(store.open(writer.commit()))


def test_verify_reads_the_evolution_of_a_run(store, artifact, folder, tmp_path, capsys):
    verify("run-1", root=str(tmp_path), json_=True)
    assert json.loads(capsys.readouterr().out)["problems"] == []
    recommitted(store, artifact, folder, lambda files: edit(files, dtype="bfloat16"))
    with pytest.raises(SystemExit):
        verify("run-1", root=str(tmp_path), json_=True)
    assert "array hidden is float32" in json.loads(capsys.readouterr().out)["problems"][0]


def clean(store, retention) -> None:
    for removable in find_removable(store, retention, timedelta(0)).removable:
        remove(store.name.rpartition("/")[0], removable)


def test_old_checkpoints_go_and_their_evolution_stays(store):
    samples, also = {2: sample_of(2)}, ("checkpoint/model",)
    refs = [write(store, samples, iteration, also=also) for iteration in range(2)]
    clean(store, Retention(keep_last_checkpoint=True))
    old = store.open(refs[0])
    assert (old.expiry is not None, has_evolution(old), verify_evolution(old)) == (True, True, [])
    with pytest.raises(ConfigError, match="checkpoint/model among them, were removed"):
        old.read_bytes("checkpoint/model")


def test_evolution_that_retention_removed_is_not_missed(store):
    refs = [write(store, {2: sample_of(2)}, iteration) for iteration in range(2)]
    clean(store, Retention(keep_iterations=1))
    assert not has_evolution(store.open(refs[0]))
    with pytest.raises(ConfigError, match="removed by retention"):
        EvolutionArchive.open(store.open(refs[0]))
