"""The training loop: rollout, routing archive, replayed training, evaluation; again."""

from prefect import flow
from prefect.runtime import flow_run

from moe_replay.archive.commits import ArtifactRef
from moe_replay.config import RunConfig
from moe_replay.stages.run import Run
from tasks.engines import running_engines
from tasks.preparation import prepare_run
from tasks.reporting import report_results
from tasks.stages import archive_routes, configured, evaluate_policy, generate_rollouts, train_replayed
from tasks.tracking import close_tracking, open_tracking, track_iteration


@flow(name="train", flow_run_name="train-{run_id}", persist_result=False)
def train(config: RunConfig = RunConfig(), run_id: str | None = None) -> dict[str, str]:  # noqa: B008 (frozen)
    """Train a Mixture-of-Experts policy with routing replay.

    The same `run_id` continues a run at its first stage without a commit. Without one the flow run's own name is
    taken, so that retrying the flow run continues it too.

    Returns:
        `run_id`, `root` and `mlflow_run_id`.
    """
    run = prepare_run(config, run_id or f"run-{str(flow_run.id)[:8]}")
    with running_engines(run):
        tracked = open_tracking(run)
        succeeded = False
        try:
            policy, results = run.initial_policy, []
            for n in range(config.iterations):
                policy, metrics = iterate(run, n, policy, tracked)
                results.append(metrics)
                report_results(run, results)
            succeeded = True
        finally:
            close_tracking(run, tracked, succeeded)
    return {"run_id": run.run_id, "root": run.root, "mlflow_run_id": tracked}


@flow(name="iteration", flow_run_name="{run.run_id}-{n}", persist_result=False)
def iterate(run: Run, n: int, policy: ArtifactRef, tracked: str) -> tuple[ArtifactRef, dict[str, float]]:
    """Roll out, archive the routes, train under them, evaluate. Returns the next policy and the metrics."""
    stages = run.config.stages
    rollout = configured(generate_rollouts, stages)(run, n, policy)
    routes = configured(archive_routes, stages)(run, n, rollout)
    policy = configured(train_replayed, stages)(run, n, policy, rollout, routes)
    if run.config.evaluates(n):
        configured(evaluate_policy, stages)(run, n, policy)
    return policy, track_iteration(run, tracked, n)
