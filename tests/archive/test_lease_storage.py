"""The lease on a run whose storage fails for a while, or loses what is in it."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lease_claims import TOKEN, claim_of, elsewhere, put, until
from passing_time import Clock

from moe_replay.archive import lease as lease_module
from moe_replay.archive.claims import Claim, find_holder
from moe_replay.archive.lease import Lease, holding
from moe_replay.archive.storage import Storage
from moe_replay.errors import ConfigError, LeaseLost


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run-1"


def turn(link: Path, target: Path) -> None:
    """Have `link` lead to `target`, at once."""
    aside = link.with_name("aside")
    aside.symlink_to(target)
    aside.replace(link)


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """Called with True it lets the run's storage fail, with False it repairs that: nothing can be where a file lies."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    turn(run, folder)
    yield lambda broken: turn(run, file if broken else folder)
    # What is left of a heartbeat that was cut off halfway is no claim. A claim is removed in two steps.
    until(lambda: not [path for path in folder.rglob("*") if path.suffix in (".claim", ".json")], "no claim is left")


def test_storage_that_fails_for_a_while_stops_stages_and_costs_no_lease(run, broken, caplog):
    clock = Clock()
    caplog.set_level(logging.WARNING, lease_module.__name__)
    with holding(Storage.at(str(run)), print, clock.pace(beat_seconds=0.05)) as held:
        broken(True)
        until(lambda: caplog.records, "a heartbeat fails")
        asked = clock.asked
        until(lambda: clock.asked > asked + 2, "more heartbeats fail")
        assert [record.message.split(":")[0] for record in caplog.records] == ["no heartbeat"]
        clock.sleep(clock.pace().ttl_seconds)
        with pytest.raises(ConfigError):
            held.require()
        broken(False)
        held.require()


def test_a_claim_that_was_removed_is_a_lost_lease(run):
    lease = Lease(Storage.at(str(run)), Clock().pace())
    lease.acquire(print)
    shutil.rmtree(run)
    lease.renew()
    with pytest.raises(LeaseLost, match="its claim was removed"):
        lease.require()
    lease.release()
    assert not run.exists()


def test_a_claim_that_could_not_be_removed_on_leaving_is_removed_later_while_the_process_lives(run, broken):
    clock = Clock()
    with holding(Storage.at(str(run)), print, clock.pace()):
        broken(True)
    broken(False)
    until(lambda: find_holder(Storage.at(str(run))) is None, "the claim is removed")


def test_a_runner_refused_for_want_of_storage_leaves_no_claim_behind(run, broken):
    put(run, claim_of(elsewhere()))

    with pytest.raises(ConfigError), holding(Storage.at(str(run)), lambda _: broken(True), Clock().pace()):
        pytest.fail("held")

    broken(False)
    names = [f"{TOKEN}.claim", f"{TOKEN}.json"]
    until(lambda: sorted(path.name for path in (run / "_lease").iterdir()) == names, "our own claim is removed")
    shutil.rmtree(run / "_lease")


def test_a_heartbeat_goes_on_after_an_error_that_is_none_of_ours(run, monkeypatch, caplog):
    clock = Clock()
    caplog.set_level(logging.WARNING, lease_module.__name__)
    with holding(Storage.at(str(run)), print, clock.pace(beat_seconds=0.05)) as held:
        with monkeypatch.context() as patch:
            patch.setattr(Claim, "to_bytes", lambda _: 1 / 0)
            until(lambda: caplog.records, "a heartbeat fails")
        before = clock.asked
        until(lambda: clock.asked > before + 2, "the next heartbeats")
        held.require()
    assert [record.message for record in caplog.records] == ["no heartbeat: division by zero"]
    assert caplog.records[0].exc_info
