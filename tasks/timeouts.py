"""Time-outs of stages in worker threads, of which Prefect thinks less than they do."""

import logging

_CALLS_OF_ENGINES = {"rollout", "training", "evaluation"}


def trust_timeouts() -> None:
    """Drop Prefect's warning that the time-out of a stage on an engine can't interrupt it in a worker thread.

    It is right of a call that blocks; `EngineProcess.call` waits in short turns, and Prefect's exception reaches it
    between two of them. Called again it changes nothing.
    """
    # Filters hold for the logger that a record was made by, and Prefect makes this one by that of task runs.
    logging.getLogger("prefect.task_runs").addFilter(_is_no_needless_warning)


def _is_no_needless_warning(record: logging.LogRecord) -> bool:
    warns = str(record.msg).startswith("Timeout of %s seconds configured for this task, but")
    return not (warns and getattr(record, "task_name", None) in _CALLS_OF_ENGINES)
