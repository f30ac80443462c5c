"""What a model's sizing says, against what the archive, the trainer's batch and the fit really make."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from archive_samples import DIGEST, commit_routes, make_trace, origin_of
from predictor_samples import EXPERTS, HIDDEN, LAYERS, ROWS, STEPS, TOP_K, make_run, train

from moe_replay.analysis import measured
from moe_replay.analysis.sizing import Workload, size_iteration
from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.evolution import EvolutionArchive, array_shapes
from moe_replay.data.prompts import Prompt
from moe_replay.engines.rollout import Response
from moe_replay.engines.row_layout import PaddedRows
from moe_replay.engines.training_batch import NO_ROUTE, PassRoutes, TokenSequence
from moe_replay.errors import ConfigError, RoutingMismatch
from moe_replay.routing.declared import DeclaredRouters
from moe_replay.routing.predictor import EvolutionPredictor, PredictorProvenance
from moe_replay.routing.trace import RoutingTrace, refuse_dead_capture
from moe_replay.stages.carrying import PartialAbout, write_carried
from moe_replay.stages.prompt_groups import Begun, PromptGroup
from moe_replay.stages.samples import Sample, write_samples

CODECS = ("expert-set", "expert-set, order kept", "zstd")


def routers_of(num_experts: int, top_k: int, layers=(1, 2, 5), hidden_size: int = 32) -> DeclaredRouters:
    return DeclaredRouters("made_up", tuple(layers), num_experts, top_k, hidden_size, 7, False)


def workload_of(codec: str, **settings) -> Workload:
    return Workload(codec=codec.split(",")[0], keep_order="kept" in codec, **settings)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "sequences", "tokens", "chunk_tokens"),
    [(16, 4, 6, 30, 64), (256, 8, 4, 16, 16), (257, 3, 2, 50, 33), (8, 2, 4, 9, 65536)],
)
def test_an_archive_has_the_bytes_chunks_and_objects_that_were_told(
    codec, num_experts, top_k, sequences, tokens, chunk_tokens, tmp_path
):
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({})
    traces = [make_trace(tokens, num_experts, top_k, seed=n, missing=[tokens - 1]) for n in range(sequences)]
    load = workload_of(codec, sequences=sequences, mini_steps=1, chunk_tokens=chunk_tokens)
    options = {"codec": load.codec, "keep_order": load.keep_order}
    artifact = store.open(commit_routes(store, traces, origin_of(num_experts, top_k), 0, chunk_tokens, **options))
    (told,) = size_iteration(routers_of(num_experts, top_k), load, (tokens,)).routes
    objects = [stored.path for stored in artifact.commit.objects]
    assert told.raw_bytes == zarr.open_array(artifact.zarr_store("routes"), path="ids", mode="r").nbytes
    assert told.chunks == sum(path.startswith("routes/ids/c/") for path in objects)
    assert told.objects == len(objects)
    assert told.trace_bytes_per_sequence == traces[0].ids_TLK.nbytes + traces[0].valid_T.nbytes


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (256, 8), (8, 2), (96, 6)])
def test_uniform_routes_take_what_was_told(codec, num_experts, top_k, tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({})
    traces = [make_trace(8192, num_experts, top_k, (0,), seed=n) for n in range(2)]
    load = workload_of(codec, sequences=2, mini_steps=1)
    options = {"codec": load.codec, "keep_order": load.keep_order}
    artifact = store.open(commit_routes(store, traces, origin_of(num_experts, top_k, (0,)), **options))
    (told,) = size_iteration(routers_of(num_experts, top_k, (0,)), load, (8192,)).routes
    stored = sum(one.size for one in artifact.commit.objects if one.path.startswith("routes/ids/c/"))
    # 6 of 96 was not measured: what a codec takes beyond its yardstick is that of the nearest shape.
    assert stored == pytest.approx(told.stored_bytes, rel=0.05 if num_experts == 96 else 0.01)
    assert stored >= told.bound_bytes
    assert told.chunk_bytes == told.stored_bytes


def test_raw_is_what_the_ids_take():
    (told,) = size_iteration(routers_of(300, 4), workload_of("raw", sequences=8), (64,)).routes
    assert told.stored_bytes == told.raw_bytes == 8 * 64 * 3 * 4 * 2
    assert (told.encode_core_seconds, told.write_seconds) == (0, None)


def test_a_sequence_takes_the_trainers_memory_that_was_told():
    trace, tokens = make_trace(40, missing=[39]), torch.arange(40)
    routes = PassRoutes([trace]).fields([TokenSequence(tokens[:10], tokens[10:])], 16, 4, (1, 2, 5))["routed_experts"]
    targets = PaddedRows(torch.tensor([40])).to_rows(routes.values().to(torch.int64), NO_ROUTE)
    present = (targets != NO_ROUTE).all(-1).all(-1)
    (told,) = size_iteration(routers_of(16, 4), Workload(sequences=4), (40,)).routes
    assert told.trainer_bytes_per_sequence == routes.values().nbytes
    assert told.device_bytes_per_sequence == targets.nbytes + present.nbytes
    assert told.engine_bytes_per_sequence == np.zeros((39, 7, 4), dtype=np.uint8).nbytes


def test_the_rollout_process_holds_a_batchs_routes_once():
    ids_RLK = make_trace(256, 128, 8, range(24)).ids_TLK
    routers = routers_of(128, 8, range(24))._replace(decoder_layers=24)
    (told,) = size_iteration(routers, Workload(sequences=32), (1024,)).routes
    tracemalloc.start()
    try:
        # As `RolloutEngine.generate` has it of vLLM.
        captured = [np.concatenate([ids_RLK] * 4)[:1023] for _ in range(32)]
        traces = [RoutingTrace.from_capture(captured.pop(), 1024, 128, range(24)) for _ in range(32)]
        refuse_dead_capture(traces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The sequence that is read at the moment is there twice.
    assert peak == pytest.approx(told.rollout_peak_bytes + 2 * told.trace_bytes_per_sequence, rel=0.05)


def test_a_partial_rollout_holds_what_responses_had_and_what_is_captured_anew():
    ids_RLK = make_trace(64, 128, 8, range(96)).ids_TLK
    routers = routers_of(128, 8, range(96))._replace(decoder_layers=96)
    load = Workload(sequences=12, carried_sequences=4)
    (told,) = size_iteration(routers, load, (1024,)).routes
    tracemalloc.start()
    try:
        # A last stretch, of a single token, of all that is at work.
        begun = [begun_of(RoutingTrace.from_capture(again(ids_RLK)[:1022], 1023, 128, range(96)), n) for n in range(16)]
        captured = [again(ids_RLK)[:1023] for _ in begun]
        new = [RoutingTrace.from_capture(captured.pop(), 1024, 128, range(96)).slice_tokens(1022, 1024) for _ in begun]
        refuse_dead_capture(new)
        for number, one in enumerate(begun):
            stretch = replace(one.response, response_ids=[7], log_probs=[-1.0], text="", trace=new[number])
            begun[number] = one.grown(stretch, 4, 2048)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [one.response.trace.num_tokens for one in begun] == [1024] * 16
    # The sequence that is taken at the moment is there twice more; lists of tokens and log-probs are not counted.
    assert peak == pytest.approx(told.rollout_peak_bytes + 2 * told.trace_bytes_per_sequence, rel=0.1)


def again(ids_RLK: np.ndarray) -> np.ndarray:
    return np.concatenate([ids_RLK] * 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evolution_and_predictor_take_what_was_told(dtype, tmp_path):
    run = make_run(tmp_path)
    archive = EvolutionArchive.open(run.store().open(train(run, 0)))
    provenance = archive.provenance.model_copy(update={"dtype": dtype})
    load = Workload(sequences=9, mini_steps=3, evolution_tokens=ROWS * len(STEPS) + 1, evolution_dtype=dtype)
    routers = routers_of(EXPERTS, TOP_K, LAYERS, HIDDEN)
    told = size_iteration(routers, load, (500,)).evolution
    assert told is not None
    arrays = array_shapes(provenance).values()
    assert told.tokens == provenance.tokens == ROWS * len(STEPS)
    assert told.raw_bytes == sum(np.empty(shape, element).nbytes for shape, element in arrays)
    objects = [one.path for one in archive.artifact.commit.objects if one.path.startswith("evolution/")]
    assert told.objects == len(objects)
    layer = archive.read_layer(0)
    assert told.mini_step_bytes * len(STEPS) == (layer.hidden_SH.nbytes + layer.old_SE.nbytes) * len(LAYERS)
    file = predictor_of(routers).to_bytes()
    assert told.predictor_bytes == len(file) - 8 - int.from_bytes(file[:8], "little")


def predictor_of(routers: DeclaredRouters) -> EvolutionPredictor:
    provenance = PredictorProvenance(
        run_id="run-1",
        iteration=0,
        layers=routers.layers,
        num_experts=routers.num_experts,
        hidden_size=routers.hidden_size,
        evolution=(),
        objective="ridge",
    )
    shape = (routers.num_experts, routers.hidden_size)
    return EvolutionPredictor({layer: torch.ones(shape) for layer in routers.layers}, provenance)


def test_short_batches_are_sampled_whole_but_for_last_tokens():
    told = size_iteration(routers_of(16, 4), Workload(sequences=8, mini_steps=4), (11,)).evolution
    assert told is not None
    assert told.tokens == 3 * (2 * 10)


@pytest.mark.parametrize("settings", [{"evolution_tokens": None}, {"mini_steps": 1}])
def test_no_evolution_where_none_is_recorded(settings):
    assert size_iteration(routers_of(16, 4), Workload(sequences=8, **settings), (11,)).evolution is None


def test_figures_scale_from_the_nearest_that_was_measured():
    for codec, figures in measured.CODECS.items():
        for found in figures:
            assert measured.nearest_figures(codec, found.num_experts, found.top_k) == found
            size = measured.bytes_per_row(codec, found.num_experts, found.top_k)
            assert size == pytest.approx(found.bytes_per_row)
    for fit in measured.RIDGE_FITS:
        assert measured.ridge_seconds(*fit[:3]) == pytest.approx(fit.seconds)
    assert measured.ridge_seconds(2048, 128, 8190) < 2 * measured.RIDGE_FITS[0].seconds


def test_what_is_no_iteration_is_refused():
    with pytest.raises(ConfigError, match="4 mini-steps do not divide 6"):
        size_iteration(routers_of(16, 4), Workload(sequences=6), (8,))
    with pytest.raises(ConfigError, match="2 tokens at least"):
        size_iteration(routers_of(16, 4), Workload(), (8, 1))
    with pytest.raises(RoutingMismatch, match="16 bits wide"):
        size_iteration(routers_of(70000, 4), Workload(), (8,))


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (256, 8), (64, 8)])
def test_the_rollout_keeps_captured_routes_of_the_size_that_was_told(num_experts, top_k, tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({})
    writer = store.begin("rollout", 0, {}, DIGEST)
    traces = [make_trace(8192, num_experts, top_k, range(4), seed=n) for n in range(2)]
    write_samples(writer, [sample_of(number, trace) for number, trace in enumerate(traces)])
    commit = store.open(writer.commit()).commit
    stored = sum(one.size for one in commit.objects if one.path.startswith("captured-"))
    (told,) = size_iteration(
        routers_of(num_experts, top_k, range(4)), Workload(sequences=2, mini_steps=1), (8192,)
    ).routes
    assert stored == pytest.approx(told.captured_bytes, rel=0.02)


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (256, 8)])
def test_a_rollout_leaves_to_the_next_no_more_than_was_told_and_hardly_less(num_experts, top_k, tmp_path):
    store = RunStore(str(tmp_path), "run-1")
    store.create_run({})
    traces = [make_trace(4096, num_experts, top_k, range(4), seed=n) for n in range(4)]
    members: list[Begun | None] = [begun_of(trace, seed) for seed, trace in enumerate(traces)]
    prompt = Prompt(row=0, messages=[], data_source="made_up", ground_truth=None, extra_info={})
    writer = store.begin("rollout", 0, {}, DIGEST)
    about = PartialAbout(prompts_drawn=1, data_sha256="0" * 64, origins={})
    write_carried(writer, [PromptGroup(0, prompt, members)], about)
    stored = sum(one.size for one in store.open(writer.commit()).commit.objects)
    load = Workload(sequences=4, carried_sequences=4)
    (told,) = size_iteration(routers_of(num_experts, top_k, range(4)), load, (4096,)).routes
    # Four layers only: of a large model's bytes routes are nearly all.
    assert 0.85 * told.carried_bytes < stored < told.carried_bytes


def begun_of(trace: RoutingTrace, seed: int) -> Begun:
    """A response of tokens that are as hard to compress as those of a large vocabulary, of four letters each."""
    rng = np.random.default_rng(seed)
    number = trace.num_tokens - 1
    letters = rng.integers(97, 123, 4 * number, dtype=np.uint8).tobytes().decode()
    response = Response(
        prompt_ids=[1],
        response_ids=rng.integers(0, 150_000, number).tolist(),
        log_probs=(-rng.exponential(1.0, number)).tolist(),
        text=letters,
        truncated=True,
        trace=trace,
    )
    return Begun.of(response, [3] * number, number + 1)


def sample_of(number: int, trace: RoutingTrace) -> Sample:
    return Sample(
        sequence_id=number,
        prompt_row=number,
        group=0,
        data_source="made_up",
        prompt_ids=[1],
        response_ids=[2] * (trace.num_tokens - 1),
        log_probs=[-1.0] * (trace.num_tokens - 1),
        text="",
        reward=0.0,
        truncated=True,
        trace=trace,
    )
