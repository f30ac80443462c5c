"""Time that passes for a lease only when the test says so, so that no assertion hangs on how fast a machine is."""

from dataclasses import dataclass

from moe_replay.archive.lease import Pace


@dataclass
class Clock:
    """Stands still but for those who sleep by it."""

    now: float = 0.0
    asked: int = 0
    """How often it was read."""

    def read(self) -> float:
        """Seconds since it was made."""
        self.asked += 1
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def pace(self, beat_seconds: float = 10.0, ttl_seconds: float = 60.0) -> Pace:
        """The pace of a lease by this clock; only heartbeats in the background come by the machine's own."""
        return Pace(beat_seconds, ttl_seconds, self.read, self.sleep)
