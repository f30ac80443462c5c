"""The stage between a training and the next rollout: fit the routers' evolution predictors from archived evolution.

It needs no engine and no weights, so the command line fits again by the same code (`refit`).
"""

from collections.abc import Sequence
from contextlib import suppress

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.evolution import has_evolution
from moe_replay.archive.layout import PREDICTOR_FILE
from moe_replay.errors import ArchiveCorrupt, ConfigError, RoutingMismatch
from moe_replay.plan import ForkPoint
from moe_replay.reports.predictor_report import report_of
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.sections import PredictorConfig
from moe_replay.stages.decisions import is_skipped
from moe_replay.stages.predictor_fitting import FITTED_FILE, PredictorFit, Predictors, Window, fit_predictors
from moe_replay.stages.run import Run


def inputs_of(trainings: Sequence[ArtifactRef], previous: ArtifactRef | None) -> dict[str, ArtifactRef]:
    """The stage's inputs by name: `training`, `training_1`, ... newest first, and `previous`, the predictor before."""
    named = {f"training_{age}" if age else "training": ref for age, ref in enumerate(trainings)}
    return named | ({"previous": previous} if previous else {})


def fit_predictor(
    run: Run, iteration: int, trainings: Sequence[ArtifactRef], previous: ArtifactRef | None
) -> ArtifactRef:
    """Fit and commit the predictors to serve the next rollout with.

    Of the trainings, newest first, those whose evolution retention removed are left out, and counted in the report;
    the newest is never removed before this stage is done with it. A previous predictor that was removed counts as none.

    Raises:
        RoutingMismatch: an input is of another run, iteration or model.
        ArchiveCorrupt: an input is not as committed.
        ConfigError: retention removed the newest evolution.
    """
    writer = run.store().begin("predictor", iteration, inputs_of(trainings, previous), run.digest("predictor"))
    fork = run.forked_from
    window = Window.of([run.open(ref) for ref in trainings], fork.lineage if fork else ())
    place = window.newest.provenance.run_id, window.newest.provenance.iteration
    if place != (run.run_id, iteration):
        raise RoutingMismatch(
            f"the newest evolution is of run {place[0]}, iteration {place[1]}, expected run {run.run_id}, iteration "
            f"{iteration}; fit a predictor from the training of its own iteration"
        )
    fitted_by = fork.run_id if fork and previous == fork.predictor else run.run_id
    before = read_predictors(run.open(previous), fitted_by, iteration - 1) if previous else None
    fit = fit_predictors(window, run.config.predictor, before, is_first=previous is None)
    for name, data in fit.objects().items():
        writer.write_bytes(name, data)
    return writer.commit(metrics=fit.report.metrics(), attributes={"objective": run.config.predictor.objective})


def read_predictors(artifact: Artifact, run_id: str, iteration: int) -> Predictors | None:
    """What a predictor artifact holds; None when retention removed it.

    Raises RoutingMismatch unless it was fitted in that iteration of that run, ArchiveCorrupt when it is damaged.
    """
    if artifact.expiry is not None:
        return None
    used, fitted = (
        EvolutionPredictor.from_bytes(artifact.read_bytes(name), f"{artifact.name}/{name}")
        for name in (PREDICTOR_FILE, FITTED_FILE)
    )
    for predictor in (used, fitted):
        predictor.require_fitted_in(run_id, iteration)
    return Predictors(used, fitted, {layer.layer: layer.judged for layer in report_of(artifact).layers})


def refit(store: RunStore, settings: PredictorConfig, iteration: int, use_stored: bool) -> PredictorFit:
    """Fit an iteration's predictors again from stored evolution, judged as in the run; writes nothing.

    With `use_stored` the predictor that the run committed before is what is judged, where it is still there. Else all
    iterations before that kept their evolution are fitted with these settings first, since each is judged by the next.

    Raises:
        ConfigError: the iteration has no evolution, or retention removed it.
        RoutingMismatch, ArchiveCorrupt: as `fit_predictor`.
    """
    fork = ForkPoint.stored(store)
    trainings = _trainings(store, fork)
    if iteration not in trainings or not has_evolution(trainings[iteration]):
        raise ConfigError(
            f"run {store.run_id} has no router evolution of iteration {iteration}; it has that of "
            f"{', '.join(str(n) for n, training in trainings.items() if has_evolution(training)) or 'none'}: train "
            "with method pr2, or with evolution.record = true, and keep it from archive gc"
        )
    first = fork.iteration if fork and fork.predictor is None else 0
    lineage = fork.lineage if fork else ()

    def fit(n: int, before: Predictors | None) -> PredictorFit:
        window = [trainings[m] for m in range(n, n - settings.window, -1) if m in trainings]
        after_skipped = n - 1 in trainings and is_skipped(trainings[n - 1])
        return fit_predictors(Window.of(window, lineage), settings, before, is_first=n == first or after_skipped)

    previous = _predictors_before(store, fork, iteration) if use_stored else None
    if previous is None:
        for earlier in range(first, iteration):
            known = earlier in trainings and has_evolution(trainings[earlier])
            previous = fit(earlier, previous).predictors if known else None
    return fit(iteration, previous)


def last_with_evolution(store: RunStore) -> int:
    """The last iteration whose router evolution is there; raises ConfigError when there is none."""
    for iteration in reversed(store.iterations()):
        training = store.committed("training", iteration)
        if training is not None and has_evolution(training):
            return iteration
    raise ConfigError(
        f"run {store.run_id} holds no router evolution; train with method pr2, or with evolution.record = true"
    )


def _trainings(store: RunStore, fork: ForkPoint | None) -> dict[int, Artifact]:
    """The run's trainings by iteration, and those of the runs it was forked from, as far as these are still there."""
    found: dict[int, Artifact] = {}
    for ref in reversed(fork.trainings) if fork else ():
        with suppress(ArchiveCorrupt):
            training = store.open(ref)
            found[training.commit.iteration] = training
    own = {n: store.committed("training", n) for n in store.iterations()}
    return found | {n: training for n, training in own.items() if training is not None}


def _predictors_before(store: RunStore, fork: ForkPoint | None, iteration: int) -> Predictors | None:
    """What served an iteration, as it was committed; None where nothing did, or retention removed it."""
    if fork and fork.predictor and iteration == fork.iteration:
        return read_predictors(store.open(fork.predictor), fork.run_id, iteration - 1)
    before = store.committed("predictor", iteration - 1) if iteration else None
    return read_predictors(before, store.run_id, iteration - 1) if before else None
