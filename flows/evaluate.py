"""Evaluation of any checkpoint: of a training run at an iteration, or of a model as it is."""

from typing import NamedTuple

from prefect import flow, get_run_logger

from moe_replay.evaluations import EvaluationRequest
from tasks.engines import running_engines
from tasks.failures import LOGGED_FAILURES
from tasks.naming import evaluation_name
from tasks.preparation import prepared_evaluation
from tasks.stages import configured, evaluate_policy
from tasks.tracking.steps import track_evaluation


class Evaluated(NamedTuple):
    """What came of an evaluation."""

    evaluation_id: str
    root: str
    checkpoint: str
    """RUN@ITERATION, or a model's path."""
    already_committed: bool
    """Whether this checkpoint had been evaluated before under these settings, so that nothing was to be done."""
    scores: dict[str, float]
    mlflow_run_id: str


@flow(name="evaluate", flow_run_name=evaluation_name, persist_result=False, **LOGGED_FAILURES)
def evaluate(
    request: EvaluationRequest = EvaluationRequest(),  # noqa: B008 (frozen)
    evaluation_id: str | None = None,
) -> Evaluated:
    """Score a checkpoint on benchmarks, with settings of its own.

    The same request made again scores a checkpoint that is new, and does nothing for one that has not changed. An
    evaluation that another runner works on is refused.

    Args:
        request: What to evaluate, and how.
        evaluation_id: Name of the evaluation; by default made of the run's id and the settings.
    """
    with prepared_evaluation(request, evaluation_id) as evaluation:
        run, iteration, policy = evaluation.run, evaluation.iteration, evaluation.policy
        already = run.find("evaluation", iteration, {"policy": policy}) is not None
        if already:
            get_run_logger().info("%s was evaluated before as %s; nothing to do", evaluation.checkpoint, run.run_id)
        with running_engines(run, trains=False):
            scored = configured(evaluate_policy, run.config.stages)(run, iteration, policy)
        tracked = track_evaluation(evaluation)
    scores = run.open(scored).commit.metrics
    return Evaluated(run.run_id, run.root, evaluation.checkpoint, already, scores, tracked)
