"""Two ranks under Ray against one rank in process, on the CPU: the same passes, steps and checkpoints."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from models import same_sets
from passes import BATCH, LENGTHS, ROUTES, SAMPLED, TRAINING, assert_close, assert_same_pass, gradients
from safetensors.numpy import load_file
from trainer import LAYERS, E, Trainer, foreign_routes, largest_difference
from training_calls import Asked, Seen, make_config, random_batch

from moe_replay.config import RunConfig
from moe_replay.engines.process import EngineProcess
from moe_replay.errors import ConfigError, EngineLost, RoutingMismatch


def config_of(ranks: int, method: str = "r3") -> RunConfig:
    return make_config(TRAINING, method=method, resources={"training_world_size": ranks})


class Pair:
    """One rank and two, made to start from the same weights."""

    def __init__(self, one: Trainer, two: Trainer, model: Path):
        self.one, self.two, self.both = one, two, (one, two)
        self._model = model
        self._started = 0

    def start(self, method: str = "r3") -> None:
        for ranks, trainer in enumerate(self.both, start=1):
            trainer.configure(config_of(ranks, method))
            trainer.load_weights(self._model, f"start {self._started}", False)
        self._started += 1

    def step(self, *args) -> tuple[Seen, Seen]:
        return self.one.step(BATCH, *args), self.two.step(BATCH, *args)


@pytest.fixture(scope="module")
def two_ranks(bench: EngineProcess, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """Imports of its own while `bench` is at those of one rank."""
    log = tmp_path_factory.mktemp("logs") / "training.log"
    process = EngineProcess("training_calls:Bench", (), "training", log, {"OMP_NUM_THREADS": "1"})
    assert Trainer(process).open_model(model, config_of(2)) == (E, 2, LAYERS)
    yield process
    process.stop()


@pytest.fixture
def pair(trainer: Trainer, two_ranks: EngineProcess, model: Path) -> Pair:
    trainer.open_model(model, config_of(1))
    return Pair(trainer, Trainer(two_ranks), model)


def weights(trainer: Trainer, folder: Path) -> dict[str, np.ndarray]:
    trainer.save(folder)
    return load_file(folder / "huggingface" / "model.safetensors")


@pytest.mark.parametrize("routes", [None, ROUTES], ids=["live", "replayed"])
def test_a_scoring_pass_is_that_of_one_rank(pair, routes):
    pair.start()
    one, two = (trainer.score(BATCH, routes) for trainer in pair.both)
    assert_same_pass(one, two)
    assert largest_difference(one.entropy, two.entropy) < 1e-5


def test_a_predicted_pass_and_its_reference_are_those_of_one_rank(pair):
    pair.start()
    drawn = np.random.default_rng(2)
    predictor = {layer: drawn.normal(0, 0.3, (E, 32)).astype("float32") for layer in LAYERS}
    one, two = (trainer.score(BATCH, None, Asked(reference=ROUTES, predictor=predictor)) for trainer in pair.both)
    assert_same_pass(one, two)
    assert not all(same_sets(a, b).all() for a, b in zip(one.live, one.routed, strict=True))
    assert all(same_sets(a, b).all() for a, b in zip(one.routed, two.routed, strict=True))


@pytest.mark.parametrize("method", ["r3", "gspo", "tis"])
def test_a_step_has_the_loss_and_the_gradients_of_one_rank(pair, method, tmp_path):
    pair.start(method)
    routes = ROUTES if method == "r3" else None
    if method == "tis":
        weighted = replace(BATCH, importance_NS=np.random.default_rng(3).uniform(0, 2, BATCH.old_NS.shape).astype("f4"))
        one, two = (trainer.step(weighted, routes) for trainer in pair.both)
    else:
        one, two = pair.step(routes)
    assert_same_pass(one, two)
    assert two.loss == pytest.approx(one.loss, abs=1e-5)
    assert two.grad_norm == pytest.approx(one.grad_norm, abs=1e-5)
    assert one.grad_norm > 1e-2
    assert_close(gradients(pair.one, tmp_path / "one"), gradients(pair.two, tmp_path / "two"))


def test_router_features_come_in_the_order_of_the_batch(pair):
    pair.start()
    for trainer_pass in ("score", "step"):
        one, two = (getattr(trainer, trainer_pass)(BATCH, ROUTES, Asked(sampled=SAMPLED)) for trainer in pair.both)
        assert len(two.hidden_SLH) == sum(map(len, SAMPLED))
        np.testing.assert_allclose(two.hidden_SLH, one.hidden_SLH, rtol=0, atol=1e-5)
        np.testing.assert_allclose(two.logits_SLE, one.logits_SLE, rtol=0, atol=1e-5)


@pytest.mark.parametrize("writer", [1, 2])
def test_a_checkpoint_goes_on_under_another_number_of_ranks(pair, writer, tmp_path):
    pair.start()
    pair.step(ROUTES)
    writes, reads = pair.both if writer == 1 else reversed(pair.both)
    writes.save(tmp_path / "checkpoint")
    reads.load_weights(tmp_path / "checkpoint", f"written by {writer}", True)
    # With factors of the learning rate, so that a schedule or an optimizer started afresh would show.
    for factor in (1.0, 0.5):
        one, two = pair.step(ROUTES, Asked(lr_factor=factor))
        assert_same_pass(one, two)
        assert two.loss == pytest.approx(one.loss, abs=1e-5)
    assert_close(weights(pair.one, tmp_path / "one"), weights(pair.two, tmp_path / "two"))
    scalars = [(tmp_path / name / "optimizer" / "scalars.json").read_text() for name in ("one", "two")]
    assert scalars[0] == scalars[1]


def test_what_ranks_write_is_what_one_rank_writes(pair, tmp_path):
    pair.start()
    names = []
    for trainer, name in zip(pair.both, ("one", "two"), strict=True):
        trainer.step(BATCH, ROUTES)
        trainer.save(tmp_path / name)
        names.append({path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file()})
    assert names[0] == names[1]


def test_sequences_that_do_not_share_out_are_refused(pair):
    pair.start()
    with pytest.raises(ConfigError, match=r"9 sequences can't be shared out.*2 parts.*training_world_size = 2"):
        pair.two.score(random_batch(sequences=9), None)


def test_routes_of_other_tokens_are_refused_before_any_rank_works(pair):
    pair.start()
    with pytest.raises(RoutingMismatch, match=r"cover .* rows but sequence 4 has"):
        pair.two.step(BATCH, foreign_routes([length + (i == 4) for i, length in enumerate(LENGTHS)]))
    assert_same_pass(*pair.step(ROUTES))


def test_a_rank_that_dies_at_work_is_an_engine_lost_and_stopping_leaves_nothing(pair, two_ranks):
    """The last test, since it takes the engine that the others share."""
    pair.start()
    started = psutil.Process(two_ranks.pid).children(recursive=True)
    ranks = [process for process in started if "ReplayWorker" in "".join(process.cmdline())]
    assert len(ranks) == 2
    threading.Timer(0.3, os.kill, (ranks[1].pid, signal.SIGKILL)).start()

    def work() -> None:
        for _ in range(1000):
            pair.two.score(BATCH, ROUTES)

    with pytest.raises(EngineLost, match=r"a rank of training \(of 2\) died.*a retry starts fresh ones") as caught:
        work()
    assert caught.value.transient
    two_ranks.stop()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
