"""Claims of runners on a run, in its folder `_lease`, and whether those who made them still live.

A claim is two objects: `<token>.claim` is written once, so that no listing can miss it for being replaced, and
`<token>.json` says who claims the run and is replaced with every heartbeat. The clocks of machines are never compared
to decide anything.
"""

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from moe_replay.archive.commits import canonical_json
from moe_replay.archive.storage import Storage

CLAIMS_FOLDER = "_lease"
"""Folder, in the run's, of the claims."""

_MARKER = re.compile(r"([0-9a-f]{32})\.claim")
# Also what is left of a heartbeat that was killed halfway.
_CLAIM_OBJECT = re.compile(rf"{CLAIMS_FOLDER}/\.?([0-9a-f]{{32}})\.(claim|json)(\.[0-9a-f]{{32}})?")
_PROCESSES = Path("/proc")

Fate = Literal["alive", "dead", "unknown"]
State = Literal["waiting", "taking", "holding"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Runner(_Record):
    """One process on one machine."""

    host: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=255)
    boot: str | None = Field(pattern=r"^[0-9a-f-]{1,64}$")
    """Tells one start of the machine from another; none where the system does not say."""
    pid_namespace: int | None
    """Within which `pid` names a process; containers have their own."""
    pid: int = Field(ge=1, lt=2**31)
    started: int | None
    """When the process started, in the kernel's ticks since boot: tells it from a later one of the same pid."""

    @classmethod
    def this_process(cls) -> "Runner":
        """The process that asks."""
        host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:255] or "unknown"
        boot, namespace = _machine()
        found = _process(os.getpid())
        started = found.started if found else None
        return cls(host=host, boot=boot, pid_namespace=namespace, pid=os.getpid(), started=started)

    def fate_seen_from(self, other: "Runner") -> Fate:
        """What the process table tells `other` of this process; `unknown` from elsewhere, and of a stopped process.

        The host's name is compared too: machines restored from one image can be alike in all else.
        """
        here = (self.host, self.boot, self.pid_namespace) == (other.host, other.boot, other.pid_namespace)
        if not here or self.boot is None or self.pid_namespace is None or self.started is None:
            return "unknown"
        found = _process(self.pid)
        if found is None:
            return _fate_by_signal(self.pid)
        if found.started != self.started or found.state in "ZX":
            return "dead"
        return "unknown" if found.state in "Tt" else "alive"

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}"


class Claim(_Record):
    """What a runner says of itself."""

    state: State
    runner: Runner
    began: AwareDatetime
    """When the runner came, by its own clock."""
    beat: int = Field(ge=0)
    """Grows with every heartbeat."""
    at: AwareDatetime
    """When that was, by the runner's own clock."""

    def to_bytes(self) -> bytes:
        """The object's content."""
        return canonical_json(self.model_dump(mode="json"))


@dataclass(frozen=True)
class SeenClaim:
    """A claim of another, as it was found."""

    token: str
    claim: Claim | None
    """None when it is unreadable."""
    fate: Fate
    silent_seconds: float
    """For how long it was watched and did not change."""

    @property
    def state(self) -> State:
        """What the claim says; an unreadable one may be the holder's."""
        return self.claim.state if self.claim else "holding"

    def __str__(self) -> str:
        return str(self.claim.runner) if self.claim else f"of the unreadable claim {self.token}"


class Claims:
    """All claims on one run, watched by one runner."""

    def __init__(self, run: Storage, runner: Runner, ttl_seconds: float, clock: Callable[[], float]) -> None:
        self._folder = run / CLAIMS_FOLDER
        self._run = run
        self._runner = runner
        self._ttl = ttl_seconds
        self._clock = clock
        self._watched: dict[str, tuple[bytes, float, bool]] = {}
        """By token: the content, since when it is unchanged, and whether it ever changed."""

    def tokens(self) -> set[str]:
        """Of all claims, in one request."""
        return {match[1] for path in self._folder.files(deep=False) if (match := _MARKER.fullmatch(path))}

    def others(self, tokens: set[str]) -> list[SeenClaim]:
        """The claims of these tokens that are still there.

        One from another machine is alive once it changed while it was watched, and dead when it did not for the
        time to live.
        """
        found = (self._look_at(token) for token in sorted(tokens))
        return [claim for claim in found if claim is not None]

    def put(self, token: str, claim: Claim) -> None:
        """Write or replace what a claim says."""
        self._folder.write(f"{token}.json", claim.to_bytes())

    def mark(self, token: str) -> None:
        """Show a claim to all; what it says must be there."""
        self._folder.write(f"{token}.claim", b"{}\n")

    def remove(self, token: str) -> None:
        """Remove a claim, and on a local disk the folders that are empty without it."""
        # Whoever lists the one finds the other, or knows that the claim is on its way out.
        self._folder.remove(f"{token}.claim")
        self._folder.remove(f"{token}.json")
        for folder in (self._folder.local_folder, self._run.local_folder):
            with suppress(OSError):
                if folder is not None:
                    folder.rmdir()

    def _look_at(self, token: str) -> SeenClaim | None:
        asked = self._clock()
        try:
            data = self._folder.read(f"{token}.json")
        except FileNotFoundError:
            return None
        before, since, moved = self._watched.get(token, (data, self._clock(), False))
        if data != before:
            since, moved = self._clock(), True
        self._watched[token] = data, since, moved
        claim = _parsed(data)
        # The time of asking: an answer that took long must not count as silence.
        silent = max(0.0, asked - since)
        fate = claim.runner.fate_seen_from(self._runner) if claim else "unknown"
        if fate == "unknown":
            fate = "dead" if silent >= self._ttl else "alive" if moved else "unknown"
        return SeenClaim(token, claim, fate, silent)


def find_holder(run: Storage) -> Claim | None:
    """The claim of the runner that has the run, None when there is none or its process is known to have ended."""
    claims = Claims(run, Runner.this_process(), float("inf"), lambda: 0.0)
    seen = (one for one in claims.others(claims.tokens()) if one.state != "waiting" and one.fate != "dead")
    return max((one.claim for one in seen if one.claim), key=lambda claim: claim.at, default=None)


def claimed_by(path: str) -> str | None:
    """The token of the claim that an object, named from the run's folder, belongs to; None for other objects."""
    match = _CLAIM_OBJECT.fullmatch(path)
    return match and match[1]


def _parsed(data: bytes) -> Claim | None:
    try:
        return Claim.model_validate(json.loads(data))
    except (ValueError, ValidationError):
        return None


@dataclass(frozen=True)
class _Process:
    state: str
    started: int


def _process(pid: int) -> _Process | None:
    """What the kernel says of a process; None when it is not there or not to be seen."""
    try:
        # The command's name, in parentheses, may hold anything.
        fields = (_PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return _Process(fields[0].decode(), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def _fate_by_signal(pid: int) -> Fate:
    """Whether there is a process at all; of other users' the system may hide the rest."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except OSError:
        pass
    return "unknown"


@cache
def _machine() -> tuple[str | None, int | None]:
    boot, namespace = None, None
    with suppress(OSError):
        boot = (_PROCESSES / "sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = (_PROCESSES / "self/ns/pid").stat().st_ino
    return boot, namespace
