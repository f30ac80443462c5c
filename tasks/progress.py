"""Progress of long work: to whoever listens in this process, and to Prefect as artifacts."""

import re
import time
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.events import EVENT_EVERY_SECONDS, tell_progress
from tasks.listeners import Listeners

_FIRST_REPORT_SECONDS = 2.0
_REPORT_EVERY_SECONDS = 1.0
_progress = Listeners[[str, int, int, str]]()
listening = _progress.hearing
"""Has a listener called with (stage, done, total, what) when progress is made in this process."""


def artifact_key(*parts: str) -> str:
    """A key that Prefect takes: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class StageProgress:
    """Passes a stage's progress on; a Prefect artifact is made only for a stage long enough to be watched."""

    def __init__(self, run_id: str, stage: str, iteration: int):
        self._run_id, self._stage, self._iteration = run_id, stage, iteration
        self._key = artifact_key(run_id, stage, str(iteration))
        self._next_report = time.monotonic() + _FIRST_REPORT_SECONDS
        self._next_event = time.monotonic() + EVENT_EVERY_SECONDS
        self._artifact: UUID | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that `done` of `total` are through."""
        _progress.tell(self._stage, done, total, what)
        if time.monotonic() >= self._next_event:
            tell_progress(self._run_id, self._stage, self._iteration)
            self._next_event = time.monotonic() + EVENT_EVERY_SECONDS
        if total and time.monotonic() >= self._next_report:
            self._report(100 * done / total, f"{done} of {total} {what}")
            self._next_report = time.monotonic() + _REPORT_EVERY_SECONDS

    def finish(self) -> None:
        """Say that the stage is through, where somebody was told how far it is."""
        if self._artifact is not None:
            self._report(100.0, "done")

    def _report(self, percent: float, description: str) -> None:
        try:
            if self._artifact is None:
                created = create_progress_artifact(progress=percent, key=self._key, description=description)
                assert isinstance(created, UUID)
                self._artifact = created
            else:
                update_progress_artifact(self._artifact, progress=percent, description=description)
        except Exception as error:
            # A server that does not answer for a moment must not cost an hour of rollout.
            get_run_logger().warning("progress could not be reported (%s)", type(error).__name__)
