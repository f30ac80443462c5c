"""What can go wrong, and whether trying again may help.

Every message states the rule that was broken, the numbers seen, and the way out.
"""


class ReplayError(Exception):
    """Base of all errors moe-replay raises on purpose; permanent unless a child says otherwise."""

    transient = False


class ConfigError(ReplayError, ValueError):
    """Permanent: what the user asked for can't be run. The command line exits with code 2."""


class RoutingMismatch(ReplayError, ValueError):
    """Permanent: routes do not belong to these tokens, layers, experts or weights."""


class ArchiveCorrupt(ReplayError, ValueError):
    """Permanent: a stored object is missing, truncated, altered or of another run."""


class RunInUse(ReplayError, RuntimeError):
    """Permanent: another runner works on the run; once it has ended the same command goes on."""


class LeaseLost(ReplayError, RuntimeError):
    """Permanent: another runner took the run over, since this one gave no sign of life for a while."""


class EngineFailed(ReplayError, RuntimeError):
    """Permanent: an engine raised an error of its own; its log has the traceback."""


class EngineLost(ReplayError, RuntimeError):
    """Transient: an engine process died; a fresh engine may succeed."""

    transient = True


class EngineStopped(ReplayError, RuntimeError):
    """Permanent: an engine was stopped at its work, since the run ends."""


class OutOfMemory(ReplayError, RuntimeError):
    """Transient: an engine's memory did not do; a fresh engine has more, or is given less to hold at once."""

    transient = True

    def __init__(self, message: str, micro_batch_tokens: int | None = None):
        """`micro_batch_tokens` is what the largest micro-batch of a training pass could hold, where one failed."""
        super().__init__(message)
        self.micro_batch_tokens = micro_batch_tokens


class TrackingUnavailable(ReplayError, RuntimeError):
    """Transient: MLflow did not answer; a later attempt may succeed."""

    transient = True


class StorageFull(ReplayError, OSError):
    """Permanent: a disk or a quota is full.

    Another attempt would make the whole stage again only to fail where this one did, having left its own share of
    what fills the disk: somebody has to make room first.
    """


class StorageUnavailable(ReplayError, OSError):
    """Transient: object storage did not answer or cut the transfer; a later attempt may succeed."""

    transient = True


class StabilityAlarm(ReplayError, RuntimeError):
    """Permanent: a batch is too far from the policy that sampled it, and what becomes of it is not decided.

    The command line exits with code 3.
    """

    def __init__(self, message: str, metric: str, value: float, bound: float):
        """`value` of `metric` is beyond `bound`; the message says what to do."""
        super().__init__(message, metric, value, bound)
        self.metric, self.value, self.bound = metric, value, bound

    def __str__(self) -> str:
        return self.args[0]
