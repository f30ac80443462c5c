"""Stages that work beside others: what ends when one of both fails, or somebody interrupts."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.beside import beside
from moe_replay.archive.commits import ArtifactRef
from moe_replay.config import RunConfig
from moe_replay.engines.pool import EnginePool
from moe_replay.engines.process import EngineProcess
from moe_replay.errors import ConfigError, EngineStopped, LeaseLost
from moe_replay.stages.run import DataFile, Run
from tasks.engines import engines_of, keeping_engines, running_engines

MADE = ArtifactRef(uri="iterations/00001/rollout", sha256="a" * 64)


class SleepersPool(EnginePool):
    """Its rollout engine is a process that sleeps when it is asked to."""

    def rollout(self) -> EngineProcess:
        return self._get("rollout", "process_calls:Counter", (0,), {})


@pytest.fixture
def run(tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "engines"))
    monkeypatch.setattr("tasks.engines.EnginePool", SleepersPool)
    made = Run(
        run_id="run",
        root=str(tmp_path),
        home=tmp_path / "home",
        config=RunConfig(),
        model=tmp_path / "model",
        model_sha256="0" * 64,
        train=DataFile(path=tmp_path / "train.parquet", sha256="0" * 64),
        benchmarks={},
    )
    with temporary_settings({PREFECT_API_URL: prefect_api}), running_engines(made, trains=False):
        yield made


class Stage:
    """A stage whose engine works for some seconds."""

    def __init__(self, run: Run, seconds: float, fails: bool = False) -> None:
        self.run, self.seconds, self.fails = run, seconds, fails
        self.began = threading.Event()
        self.ended: str = "not yet"

    def work(self) -> ArtifactRef:
        try:
            engine = engines_of(self.run).rollout()
            engine.call("process_calls:sleep", lambda *_: self.began.set(), self.seconds)
            self.ended = "by itself"
        except EngineStopped:
            self.ended = "stopped"
            raise
        if self.fails:
            raise ConfigError("the stage beside failed")
        return MADE


def go(run: Run, stage: Stage, block: Callable[[], None]) -> ArtifactRef | None:
    """A flow with the stage beside the block."""
    work = task(stage.work, name="beside")

    @flow(name="beside", persist_result=False)
    def both() -> ArtifactRef | None:
        with beside(run, work.submit) as ahead:
            assert stage.began.wait(30)
            block()
        return ahead.result() if ahead else None

    return both()


def raising(error: BaseException) -> Callable[[], None]:
    def block() -> None:
        raise error

    return block


def test_the_block_ends_when_the_stage_has_ended(run: Run) -> None:
    stage = Stage(run, seconds=0.5)
    assert go(run, stage, lambda: None) == MADE
    assert stage.ended == "by itself"


def test_a_stage_that_fails_fails_the_block(run: Run) -> None:
    with pytest.raises(ConfigError, match="the stage beside failed"):
        go(run, Stage(run, seconds=0, fails=True), lambda: None)


@pytest.mark.parametrize("fails", [False, True])
def test_where_the_block_fails_the_stage_ends_first_and_the_blocks_error_is_told(run: Run, fails: bool) -> None:
    stage = Stage(run, seconds=0.5, fails=fails)
    with pytest.raises(ConfigError, match="the block failed"):
        go(run, stage, raising(ConfigError("the block failed")))
    assert stage.ended == "by itself"


@pytest.mark.parametrize("at_work", [False, True])
def test_a_stage_is_told_to_be_waited_for_where_it_is(
    run: Run, at_work: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(run, seconds=1 if at_work else 0)

    def block() -> None:
        while not at_work and stage.ended == "not yet":
            time.sleep(0.1)
        time.sleep(0 if at_work else 1)
        raise ConfigError("the block failed")

    with pytest.raises(ConfigError, match="the block failed"):
        go(run, stage, block)
    told = [record.getMessage() for record in caplog.records if "is waited for" in record.getMessage()]
    assert len(told) == at_work


def test_engines_kept_from_a_run_that_was_broken_off_are_replaced(run: Run) -> None:
    with keeping_engines():
        with pytest.raises(LeaseLost), running_engines(run, trains=False):
            go(run, Stage(run, seconds=600), raising(LeaseLost("taken over")))
        with running_engines(run, trains=False):
            assert go(run, Stage(run, seconds=0), lambda: None) == MADE


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LeaseLost("taken over")], ids=repr)
def test_an_interrupt_or_a_lost_lease_stops_the_stage_at_once(run: Run, error: BaseException) -> None:
    stage, began = Stage(run, seconds=600), time.monotonic()
    with pytest.raises(type(error)):
        go(run, stage, raising(error))
    assert stage.ended == "stopped"
    assert time.monotonic() - began < 60


def test_without_a_stage_the_block_is_just_that(run: Run) -> None:
    with beside(run, None) as ahead:
        assert ahead is None
