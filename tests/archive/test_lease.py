"""The lease on a run, between real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lease_claims import LONGEST, TOKEN, claim_of, elsewhere, here, put, until
from lease_runner import TTL_SECONDS
from passing_time import Clock

from moe_replay.archive.claims import find_holder
from moe_replay.archive.lease import Lease, holding
from moe_replay.archive.storage import Storage
from moe_replay.errors import LeaseLost, RunInUse

RUNNER = str(Path(__file__).with_name("lease_runner.py"))

# One process imports, and has five children want the run at once; who gets it keeps it until the others have ended.
RACING = """
import os, sys, time
sys.path.append(sys.argv[1])
from lease_runner import PACE
from moe_replay.archive.lease import holding
from moe_replay.archive.storage import Storage
from moe_replay.errors import RunInUse

run = Storage.at(sys.argv[2])
for _ in range(int(sys.argv[3])):
    left, leave = os.pipe()
    start = time.monotonic() + 0.05
    children = []
    for _ in range(5):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(leave)
            time.sleep(max(0.0, start - time.monotonic()))
            try:
                with holding(run, lambda _: None, PACE) as lease:
                    os.read(left, 1)
                    lease.require()
            except RunInUse:
                os._exit(1)
            os._exit(0)
    ended = [os.wait() for _ in range(4)]
    os.close(leave)
    ended.append(os.wait())
    codes = [os.waitstatus_to_exitcode(status) for _, status in ended]
    print(f"{codes.count(0)} held, {codes.count(1)} refused")
"""


class Started:
    """A runner in a process of its own."""

    def __init__(self, run: Path, ahead: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, RUNNER, str(run), str(ahead)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ends_saying(self) -> str:
        """What it says when it may leave, after what it said before."""
        return self.process.communicate(timeout=LONGEST)[0].strip()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs/run-1"


@pytest.fixture
def ahead(tmp_path: Path) -> Path:
    """Says by how much the clocks of started runners are ahead."""
    path = tmp_path / "ahead"
    path.write_text("0")
    return path


@pytest.fixture
def start(run: Path, ahead: Path) -> Iterator[Callable[[], Started]]:
    """Starts runners; they are gone after the test."""
    started: list[Started] = []

    def start() -> Started:
        started.append(Started(run, ahead))
        return started[-1]

    yield start
    for runner in started:
        runner.process.kill()
        runner.process.communicate()


def pass_time(ahead: Path, seconds: float) -> None:
    """Let time pass for all started runners at once."""
    aside = ahead.with_name("ahead.new")
    aside.write_text(str(seconds))
    aside.replace(ahead)


def take(run: Path, told: list[str] | None = None) -> float:
    """Take the lease and leave it; returns for how many seconds it waited."""
    clock = Clock()
    with holding(Storage.at(str(run)), (told if told is not None else []).append, clock.pace()):
        return clock.now


def test_a_second_runner_is_refused_while_the_first_lives_and_told_of_it(run, start):
    first = start()
    assert first.says() == "holds"
    other = start()
    said = other.ends_saying()
    assert said.startswith("RunInUse")
    assert f"pid {first.process.pid} runs it since" in said
    assert "wait until that one has ended, or stop it" in said
    assert first.ends_saying() == "left"
    assert list(run.parent.iterdir()) == []


def test_a_runner_takes_over_at_once_from_one_that_was_killed_here(run, start):
    first = start()
    assert first.says() == "holds"
    first.process.kill()
    # Not waited for: a zombie is dead too.
    until(lambda: find_holder(Storage.at(str(run))) is None, "the runner is dead")
    told: list[str] = []
    assert take(run, told) == 0
    assert told == []
    assert not run.exists()


def test_a_process_that_got_the_pid_of_a_dead_runner_does_not_keep_the_run(run):
    put(run, claim_of(here(pid=os.getppid(), started=1)))
    assert take(run) == 0


def test_a_claim_that_this_process_could_not_remove_does_not_keep_it_from_the_run(run):
    put(run, claim_of(here()))
    assert take(run) == 0


@pytest.mark.parametrize("change", [{"host": "far"}, {"boot": "ffff"}, {"pid_namespace": 1}], ids=str)
def test_a_silent_claim_from_elsewhere_is_taken_over_after_the_time_to_live(run, change):
    put(run, claim_of(here(pid=2**22 + 1, **change)))
    told: list[str] = []
    assert take(run, told) == Clock().pace().ttl_seconds
    assert told[0].startswith(f"waiting for the runner {change.get('host', here().host)} pid 4194305, last heard of")
    assert "when it stays silent for another 60 s" in told[0]


def test_a_claim_from_elsewhere_that_beats_keeps_the_run(run):
    put(run, claim_of(elsewhere()))

    def beat(_: str) -> None:
        put(run, claim_of(elsewhere(), beat=2))

    with pytest.raises(RunInUse, match="far pid"), holding(Storage.at(str(run)), beat, Clock().pace()):
        pytest.fail("two runners")
    assert [path.name for path in sorted((run / "_lease").iterdir())] == [f"{TOKEN}.claim", f"{TOKEN}.json"]


def test_an_unreadable_claim_is_believed_until_it_was_silent(run):
    put(run, claim_of(elsewhere()))
    (run / "_lease" / f"{TOKEN}.json").write_text("{")
    assert take(run) == Clock().pace().ttl_seconds


def test_of_runners_that_come_at_once_exactly_one_holds(run):
    racing = [sys.executable, "-c", RACING, str(Path(__file__).parent), str(run), "20"]
    said = subprocess.run(racing, capture_output=True, text=True, timeout=2 * LONGEST, check=True).stdout.splitlines()
    assert said == ["1 held, 4 refused"] * 20
    assert list(run.parent.iterdir()) == []


def test_a_runner_that_was_stopped_for_long_is_taken_over_and_finds_out(run, start, ahead):
    first = start()
    assert first.says() == "holds"
    os.kill(first.process.pid, signal.SIGSTOP)
    other = start()
    assert other.says().startswith("waits waiting for the runner")
    pass_time(ahead, TTL_SECONDS)
    said = other.says()
    while said.startswith("waits"):
        said = other.says()
    assert said == "holds"
    os.kill(first.process.pid, signal.SIGCONT)
    said = first.says()
    assert said.startswith("LeaseLost")
    assert f"pid {other.process.pid} took over after" in said
    assert other.ends_saying() == "left"
    assert list(run.parent.iterdir()) == []


def test_a_runner_that_was_stopped_and_not_replaced_goes_on(start, ahead):
    first = start()
    assert first.says() == "holds"
    os.kill(first.process.pid, signal.SIGSTOP)
    pass_time(ahead, 1.5 * TTL_SECONDS)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.ends_saying() == "left"


def test_an_interrupt_while_waiting_leaves_nothing_of_ours(run):
    put(run, claim_of(elsewhere()))
    before = sorted((run / "_lease").iterdir())

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), holding(Storage.at(str(run)), interrupt, Clock().pace()):
        pass
    assert sorted((run / "_lease").iterdir()) == before


def test_a_lease_that_was_released_holds_nothing(run):
    lease = Lease(Storage.at(str(run)), Clock().pace())
    lease.acquire(print)
    lease.require()
    lease.release()
    with pytest.raises(LeaseLost):
        lease.require()
    lease.renew()
    assert list(run.parent.iterdir()) == []


def test_a_claim_names_no_more_than_process_and_times(run):
    with holding(Storage.at(str(run)), print, Clock().pace()):
        found = json.loads(next((run / "_lease").glob("*.json")).read_bytes())
    assert found.keys() == {"state", "runner", "began", "beat", "at"}
    assert found["runner"].keys() == {"host", "boot", "pid_namespace", "pid", "started"}
