"""Telling of iterations that ended: MLflow, the log and the run's artifacts in the Prefect UI."""

from prefect.utilities.annotations import quote

from moe_replay.stages.run import Run
from tasks.reporting import report_results
from tasks.tracking.steps import track_iteration


class Telling:
    """Tells of an iteration while the next one's rollout is at work, so that no engine waits for it.

    Where that rollout was made beside the training before (one step off), it is told of between two trainings. An
    iteration that is not told of, since the run was stopped meanwhile, is when the run is resumed.
    """

    def __init__(self, run: Run, mlflow_run_id: str) -> None:
        self._run = run
        self._mlflow_run_id = mlflow_run_id
        self._metrics: dict[int, dict[str, float]] = {}
        self._due: int | None = None

    def ended(self, n: int) -> None:
        """The iteration is to be told of."""
        self._due = n

    def catch_up(self) -> None:
        """Tell of the iteration that ended last, unless that was done, by tasks of the flow run that calls this."""
        if self._due is None:
            return
        n, self._due = self._due, None
        self._metrics[n] = track_iteration(self._run, self._mlflow_run_id, n)
        # Quoted, or the graph would join every iteration with every later report.
        report_results(self._run, quote(self._metrics), self._mlflow_run_id)
