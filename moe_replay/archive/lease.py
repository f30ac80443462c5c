"""One runner at a time on a run: a lease in the run's own storage, which needs no conditional put.

A runner writes a claim of its own, `waiting`, and only then lists the claims of others. It makes its claim `taking`
when none of them lives, looks once more, and holds the run when still none does. Two that both hold would each have
listed after writing; one wrote first, and the other's list shows what was written before it (put, get and list see
all that was put before: S3 and file systems do so). Of two that meet before either holds the one with the smaller
token goes first, the other is refused; so of any number that come at once one gets the run.

A dead claim is passed over and removed by the next holder. On one machine the process table tells the dead at once;
a claim from elsewhere is dead when its heartbeat stood still for `ttl_seconds` of the clock of whoever watches. That
may be wrong of a runner that was stopped, asleep or cut off from storage. Such a runner knows, by its own clock, that
its last heartbeat is older than half of that; it then holds nothing before it has written the next one and looked
afterwards. Either the one that takes over sees this heartbeat in its last look and steps back, or it has written
`taking` before, and is seen. What a runner does between `require` and the next one is not covered.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from moe_replay.archive.claims import Claim, Claims, Runner, SeenClaim, State
from moe_replay.archive.storage import Storage
from moe_replay.errors import LeaseLost, ReplayError, RunInUse, StorageUnavailable

TTL_SECONDS = 30.0
"""For how long a runner elsewhere must be silent before its run is taken over."""
BEAT_SECONDS = 5.0
"""From one heartbeat to the next."""

_LEAVE_SECONDS = 5.0
"""How long a runner that leaves waits for a heartbeat that is under way."""

_logger = logging.getLogger(__name__)
_tokens_of_this_process: set[str] = set()


def since_boot() -> float:
    """Seconds of a clock that nobody sets and that, where the system has such a one, runs while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True)
class Pace:
    """How a lease keeps time."""

    beat_seconds: float = BEAT_SECONDS
    ttl_seconds: float = TTL_SECONDS
    clock: Callable[[], float] = since_boot
    sleep: Callable[[float], None] = time.sleep


class Lease:
    """A runner's right to work on a run. To keep it, `renew` must be called at `pace`: see `holding`."""

    def __init__(self, run: Storage, pace: Pace = Pace(), runner: Runner | None = None) -> None:
        self._run = run
        self._pace = pace
        self._runner = runner or Runner.this_process()
        self._claims = Claims(run, self._runner, pace.ttl_seconds, pace.clock)
        self._token = uuid.uuid4().hex
        self._began = datetime.now(UTC)
        self._beat = 0
        self._renewed = float("-inf")
        """When the last heartbeat that others can rely on was begun."""
        self._lost: str | None = None
        self._lock = threading.Lock()

    def acquire(self, tell: Callable[[str], None]) -> None:
        """Take the run, after waiting for as long as it takes to know that a silent runner is dead; `tell` says so.

        Raises:
            RunInUse: another runner works on it, or waits for it and goes first.
            StorageUnavailable: as usual, and when it is too slow to keep a lease.
        """
        _tokens_of_this_process.add(self._token)
        try:
            self._put("waiting")
            self._claims.mark(self._token)
            told = float("-inf")
            while (before := self._others_before()) or not self._hold():
                if before and self._pace.clock() - told >= self._pace.beat_seconds:
                    told = self._pace.clock()
                    tell(_waiting_for(before, self._pace.ttl_seconds))
                self._pace.sleep(self._pace.beat_seconds / 10)
                self._put("waiting")
        except BaseException:
            self._withdraw()
            raise

    def renew(self) -> None:
        """Write the next heartbeat, and find out whether the lease was lost meanwhile."""
        with self._lock:
            self._renew()

    def require(self) -> None:
        """Raise LeaseLost unless the run is still this runner's.

        Asks storage only after a silence. Raises StorageUnavailable when that does not answer in time to tell.
        """
        with self._lock:
            was_stale = self._is_stale()
            if was_stale:
                self._renew()
            if self._lost is not None:
                raise LeaseLost(self._lost)
            # Whoever is stopped after the first look might as well be stopped after this call.
            if was_stale and self._is_stale():
                raise self._too_slow()

    def release(self) -> None:
        """Give the run up; a claim that can't be removed now is removed in the background once storage answers."""
        # A heartbeat after the removal would leave its object behind; one that takes long meets a store that fails.
        if not self._lock.acquire(timeout=_LEAVE_SECONDS):
            self._withdraw_later("a heartbeat waits for storage")
            return
        with_claim, self._lost = self._lost is None, self._released()
        self._lock.release()
        if with_claim:
            self._withdraw()

    def _others_before(self) -> list[SeenClaim]:
        """The claims to wait for; raises RunInUse when a runner that lives has or gets the run."""
        others = self._living()
        for other in others:
            if other.fate == "alive" and (other.state == "holding" or other.token < self._token):
                raise RunInUse(_in_use(self._run.name, other))
        return others

    def _hold(self) -> bool:
        """Take the run unless somebody came, or came back to life, while that was written."""
        self._renewed = self._put("taking")
        tokens = self._claims.tokens()
        if self._living(tokens):
            return False
        self._put("holding")
        for token in tokens - {self._token}:
            self._claims.remove(token)
        if self._is_stale():
            raise self._too_slow()
        return True

    def _renew(self) -> None:
        if self._lost is not None:
            return
        silent_since = self._renewed
        began = self._put("holding")
        silent_for = self._pace.clock() - silent_since
        tokens = self._claims.tokens()
        is_removed = self._token not in tokens
        # Nobody takes over from a runner that was never silent: who is seen to hold beside it stepped out of a silence
        # of its own, and steps back.
        others = self._living(tokens) if is_removed or silent_for >= self._pace.ttl_seconds / 2 else []
        holders = [other for other in others if other.state != "waiting"]
        if holders or is_removed:
            self._lost = _lost_to(self._run.name, holders, silent_for)
            _logger.warning(self._lost)
            self._withdraw()
        self._renewed = began

    def _living(self, tokens: set[str] | None = None) -> list[SeenClaim]:
        """Claims of others that are not known to be dead."""
        others = self._claims.others((self._claims.tokens() if tokens is None else tokens) - {self._token})
        return [other for other in others if other.fate != "dead" and not self._is_forgotten(other)]

    def _is_forgotten(self, other: SeenClaim) -> bool:
        """Whether a claim is of this very process, which could not remove it when it gave it up."""
        ours = other.claim is not None and other.claim.runner == self._runner
        return ours and other.token not in _tokens_of_this_process

    def _is_stale(self) -> bool:
        return self._pace.clock() - self._renewed >= self._pace.ttl_seconds / 2

    def _put(self, state: State) -> float:
        """Write the claim; returns when that was begun."""
        began = self._pace.clock()
        self._beat += 1
        at = datetime.now(UTC)
        self._claims.put(
            self._token, Claim(state=state, runner=self._runner, began=self._began, beat=self._beat, at=at)
        )
        return began

    def _released(self) -> str:
        return f"the lease on {self._run.name} was released"

    def _withdraw(self) -> None:
        _tokens_of_this_process.discard(self._token)
        try:
            self._claims.remove(self._token)
        except Exception as error:
            self._withdraw_later(str(error))

    def _withdraw_later(self, why: str) -> None:
        """Remove the claim as soon as that can be done; while this process lives, others on this machine believe it."""
        _tokens_of_this_process.discard(self._token)
        _logger.warning("the claim on %s can't be removed yet, which is tried again: %s", self._run.name, why)
        threading.Thread(target=self._remove_at_last, name="lease removal", daemon=True).start()

    def _remove_at_last(self) -> None:
        # After a heartbeat that is under way, and none comes after it.
        with self._lock:
            self._lost = self._lost or self._released()
        while True:
            try:
                self._claims.remove(self._token)
                return
            except Exception:  # storage still fails, however it tells
                self._pace.sleep(self._pace.beat_seconds)

    def _too_slow(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"a heartbeat in {self._run.name} took longer than {self._pace.ttl_seconds / 2:g} s, after which another "
            "runner may have taken over; try again once the storage answers faster"
        )


@contextmanager
def holding(run: Storage, tell: Callable[[str], None], pace: Pace = Pace()) -> Iterator[Lease]:
    """Hold the lease on the run in the folder `run`, with a heartbeat in the background, for as long as the block.

    Raises what `Lease.acquire` raises.
    """
    lease = Lease(run, pace)
    lease.acquire(tell)
    left = threading.Event()
    threading.Thread(target=_keep, args=(lease, left, pace.beat_seconds), name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        left.set()
        lease.release()


def _keep(lease: Lease, left: threading.Event, beat_seconds: float) -> None:
    failing = False
    while not left.wait(beat_seconds):
        try:
            lease.renew()
            failing = False
        except Exception as error:
            # Whoever needs the lease finds out by `require`; storage may come back before. What is none of our errors
            # must not end the heartbeat either, or the run would be taken over without a word.
            if not failing:
                _logger.warning("no heartbeat: %s", error, exc_info=not isinstance(error, ReplayError))
            failing = True


def _waiting_for(others: list[SeenClaim], ttl_seconds: float) -> str:
    other = others[0]
    heard = f", last heard of {other.claim.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if other.claim else ""
    left = max(0.0, ttl_seconds - other.silent_seconds)
    return f"waiting for the runner {other}{heard}; the run is taken over when it stays silent for another {left:.0f} s"


def _in_use(name: str, other: SeenClaim) -> str:
    if other.claim is None:
        who = f"a runner {other}"
    else:
        does = "runs" if other.state == "holding" else "is about to run"
        who = f"{other} {does} it since {other.claim.began.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"{name} is in use: {who}, and a run has one runner at a time; wait until that one has ended, or stop it"


def _lost_to(name: str, holders: list[SeenClaim], silent_seconds: float) -> str:
    if holders:
        how = (
            f"{holders[0]} took over after {silent_seconds:.0f} s without a heartbeat of this runner, which was "
            "stopped, asleep or cut off from storage"
        )
    else:
        how = "its claim was removed, by hand or by a runner that took over and has ended since"
    return f"the lease on {name} was lost: {how}; what is committed stays: resume the run when nobody else works on it"
