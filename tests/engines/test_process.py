"""Engines in processes of their own: what comes back from them, and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.errors import EngineLost, EngineStopped, OutOfMemory, RoutingMismatch


def start(tmp_path: Path, build: str = "process_calls:Counter", **environment: str) -> EngineProcess:
    return EngineProcess(build, (5,), "counter", tmp_path / "logs" / "counter.log", environment)


@pytest.fixture
def engine(tmp_path):
    running = start(tmp_path)
    yield running
    running.stop()


def gone(pid: int) -> bool:
    """Whether a process is no more, or waits for nothing but its parent to notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(*pids: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all(map(gone, pids))


def test_calls_run_on_one_engine_that_lives_between_them(engine):
    assert engine.call("process_calls:add", no_progress, 1) == 6
    assert engine.call("process_calls:add", no_progress, 10) == 16
    assert engine.alive
    assert engine.pid != os.getpid()
    assert os.getpgid(engine.pid) == engine.pid


def test_an_error_of_ours_arrives_as_itself_and_the_engine_goes_on(engine):
    with pytest.raises(RoutingMismatch, match=r"^routes cover 3 rows$"):
        engine.call("process_calls:mismatch", no_progress)
    assert engine.call("process_calls:add", no_progress, 1) == 6


def test_any_other_error_arrives_as_its_text(engine):
    with pytest.raises(RuntimeError, match=r"ForeignError: the kernel failed with 7;"):
        engine.call("process_calls:fail", no_progress)
    assert "Traceback" in engine.log.read_text()
    assert engine.call("process_calls:add", no_progress, 1) == 6


def test_an_allocation_that_fails_arrives_as_such_and_may_be_tried_again(engine):
    with pytest.raises(OutOfMemory, match="counter engine ran out of memory: MemoryError") as failed:
        engine.call("process_calls:exhaust", no_progress)
    assert failed.value.transient


def test_a_result_that_cannot_be_sent_is_an_error_not_silence(engine):
    with pytest.raises(RuntimeError, match="pickle"):
        engine.call("process_calls:unpicklable", no_progress)
    assert engine.call("process_calls:add", no_progress, 1) == 6


def test_a_function_that_does_not_exist_is_an_error_of_that_call(engine):
    with pytest.raises(RuntimeError, match="no_such_function"):
        engine.call("process_calls:no_such_function", no_progress)
    assert engine.call("process_calls:add", no_progress, 1) == 6


def test_progress_arrives_in_order_before_the_result(engine):
    news = []
    assert engine.call("process_calls:report", lambda *what: news.append(what), 100) == "done"
    assert news == [(done, 100, f"part {done}") for done in range(100)]


def test_an_engine_whose_call_was_broken_off_takes_no_other(engine):
    with pytest.raises(KeyboardInterrupt):
        engine.call("process_calls:report", interrupted, 100)
    assert not engine.alive
    with pytest.raises(EngineLost, match="broken off"):
        engine.call("process_calls:add", no_progress, 1)


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_call_ends_when_another_thread_stops_the_engine_and_is_not_to_be_tried_again(engine):
    asleep = threading.Event()
    with ThreadPoolExecutor(1) as other:
        call = other.submit(engine.call, "process_calls:sleep", lambda *_: asleep.set(), 600)
        assert asleep.wait(60)
        engine.stop()
        with pytest.raises(EngineStopped, match="counter engine was stopped while at work") as stopped:
            call.result(10)
    assert not stopped.value.transient
    assert wait_until_gone(engine.pid)
    with pytest.raises(EngineStopped):
        engine.call("process_calls:add", no_progress, 1)


def test_an_engine_killed_at_work_is_lost_with_exit_code_and_log(engine):
    with pytest.raises(EngineLost, match="exit code -9 while at work") as lost:
        engine.call("process_calls:sleep", lambda *_: os.kill(engine.pid, signal.SIGKILL), 600)
    assert "counter engine" in str(lost.value)
    assert str(engine.log) in str(lost.value)
    assert "going to sleep" in str(lost.value)
    assert lost.value.transient
    assert not engine.alive


def test_an_engine_that_exits_at_work_is_lost_with_exit_code_and_log(engine):
    with pytest.raises(EngineLost, match=r"exit code 3 while at work(.|\n)*leaving in the middle of work"):
        engine.call("process_calls:leave", no_progress, 3)


def test_a_call_to_an_engine_that_died_at_rest_is_lost(engine):
    engine.call("process_calls:add", no_progress, 1)
    os.kill(engine.pid, signal.SIGKILL)
    assert wait_until_gone(engine.pid)
    with pytest.raises(EngineLost, match="exit code -9"):
        engine.call("process_calls:add", no_progress, 1)


def test_a_failure_to_build_is_raised_by_the_first_call(tmp_path):
    broken = start(tmp_path, "process_calls:Broken")
    try:
        with pytest.raises(RoutingMismatch, match=r"^routes cover 5 rows$"):
            broken.call("process_calls:add", no_progress, 1)
        assert wait_until_gone(broken.pid)
        with pytest.raises(EngineLost):
            broken.call("process_calls:add", no_progress, 1)
    finally:
        broken.stop()


def test_an_engine_class_that_cannot_be_imported_is_raised_by_the_first_call(tmp_path):
    broken = start(tmp_path, "no_such_package.engine:Engine")
    try:
        with pytest.raises(RuntimeError, match="no_such_package"):
            broken.call("process_calls:add", no_progress, 1)
    finally:
        broken.stop()


def test_an_engine_that_is_stopped_at_rest_cleans_up(engine, tmp_path):
    engine.call("process_calls:leave_word", no_progress, tmp_path / "word")
    engine.stop()
    assert (tmp_path / "word").read_text() == "cleaned up"
    assert wait_until_gone(engine.pid)


def test_stop_ends_what_the_engine_started(engine):
    child = engine.call("process_calls:start_stubborn_child", no_progress)
    assert not gone(child)
    engine.stop()
    assert wait_until_gone(engine.pid, child)


def test_stop_ends_what_a_killed_engine_left_behind(engine):
    child = engine.call("process_calls:start_stubborn_child", no_progress)
    os.kill(engine.pid, signal.SIGKILL)
    assert wait_until_gone(engine.pid)
    engine.stop()
    assert wait_until_gone(child)


def test_stop_ends_an_engine_at_work(engine):
    with pytest.raises(KeyboardInterrupt):
        engine.call("process_calls:sleep", interrupted, 600)
    began = time.monotonic()
    engine.stop()
    assert time.monotonic() - began < 5
    assert wait_until_gone(engine.pid)


def test_stop_of_an_engine_that_is_gone_is_harmless(engine):
    os.kill(engine.pid, signal.SIGKILL)
    assert wait_until_gone(engine.pid)
    began = time.monotonic()
    engine.stop()
    engine.stop()
    assert time.monotonic() - began < 2


def drive(tmp_path: Path, function: str, *words: str) -> subprocess.Popen[str]:
    """Start a function of `process_calls` as a program that drives an engine."""
    program = f"import sys, process_calls\nif __name__ == '__main__': process_calls.{function}(*sys.argv[1:])\n"
    (tmp_path / "driver.py").write_text(program)
    command = [sys.executable, tmp_path / "driver.py", tmp_path / "counter.log", *words]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("then", ["rest", "work"])
def test_an_engine_and_its_children_end_when_the_driver_is_killed(tmp_path, then):
    with drive(tmp_path, "drive", then) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(gone, pids))
        driver.kill()
        assert wait_until_gone(*pids)


def test_an_engine_stopped_at_work_leaves_no_semaphores_that_the_driver_would_tell_of(tmp_path):
    driver = drive(tmp_path, "interrupt")
    assert driver.communicate(timeout=60) == ("", "")
    assert driver.returncode == 0


def test_output_of_the_engine_goes_to_its_log_alone(tmp_path, capfd):
    engine = start(tmp_path)
    engine.call("process_calls:talk", no_progress)
    engine.stop()
    lines = engine.log.read_text().splitlines()
    assert lines == ["counter built", "said by the engine", "said by its child", "said by native code"]
    assert capfd.readouterr() == ("", "")
    assert engine.log.stat().st_mode & 0o077 == 0


def test_the_environment_given_is_the_engines_only(tmp_path):
    engine = start(tmp_path, MOE_REPLAY_TEST_MARK="set")
    try:
        assert engine.call("process_calls:environment", no_progress, "MOE_REPLAY_TEST_MARK") == "set"
        assert "MOE_REPLAY_TEST_MARK" not in os.environ
    finally:
        engine.stop()
