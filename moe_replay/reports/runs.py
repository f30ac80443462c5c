"""A run's results for tables and figures, read from its committed artifacts alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.layout import IMPORTS_KEY, STAGES
from moe_replay.archive.log_probs import LOG_PROBS_FILE, read_log_probs
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.reports.extremes import ExtremeCurve
from moe_replay.reports.results import stage_metrics
from moe_replay.routing.statistics import ROUTING_FILE, RoutingStatistics

_PARALLEL_ITERATIONS = 8
_LONGEST_LINE = 200


class _Part(BaseModel):
    """What reports need of a part of `run.json`; the rest is let through."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Method(_Part):
    name: str


class _Model(_Part):
    path: str


class _Training(_Part):
    mini_steps: int


class _Settings(_Part):
    seed: int
    method: _Method
    model: _Model
    training: _Training


class _Document(_Part):
    config: _Settings
    model_sha256: str
    train_sha256: str
    benchmarks_sha256: dict[str, str]


@dataclass(frozen=True)
class IterationResults:
    """One iteration whose training is committed."""

    iteration: int
    method: str | None
    """The method's label, where the training names it."""
    metrics: dict[str, float]
    """Under the keys of `docs/methods.md`; evaluation may be missing."""
    routing: RoutingStatistics | None
    """None where retention removed it, or an older moe-replay did not write it."""
    extremes: ExtremeCurve | None
    """None as for `routing`, and where it was not asked for."""


@dataclass(frozen=True)
class RunResults:
    """What a run achieved so far."""

    run_id: str
    method: str
    """The method's label: `r3`, `r3+policy_loss=gspo`."""
    seed: int
    mini_steps: int
    """κ."""
    model: str
    """As the config names it."""
    config: dict[str, Any]
    """The whole config, as plain data."""
    sources: dict[str, str]
    """sha256 of the model and of each prompt file, by name."""
    iterations: tuple[IterationResults, ...]
    """Ascending; at least one."""
    incomplete: tuple[int, ...]
    """Iterations that were begun and whose training is not committed; left out."""

    @property
    def without_routing(self) -> tuple[int, ...]:
        """Iterations whose statistics by layer are not there, so that figures lack them and tables don't."""
        return tuple(part.iteration for part in self.iterations if part.routing is None)

    def only(self, iterations: set[int]) -> "RunResults":
        """The same run, of these iterations alone."""
        return replace(self, iterations=tuple(part for part in self.iterations if part.iteration in iterations))


def read_results(store: RunStore, extremes: bool = True) -> RunResults:
    """Read a run's results once; as `RunReader.read`."""
    return RunReader(store).read(extremes)


class RunReader:
    """Reads a run again and again while it works, and what is final only once. One reading at a time.

    An iteration is final when a later one was begun, and, of a run that makes some of its past again, when its training
    says so; it stays as it was first read, whatever happens to it in storage.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._final: dict[tuple[int, bool], IterationResults] = {}

    def read(self, extremes: bool = True, settled: int | None = None) -> RunResults:
        """The results so far; `extremes` also the log-probs of all tokens, which of a large run takes a while.

        No iteration from `settled` on is final, where that is given.

        Raises:
            ConfigError: there is no such run, it is of imports, or it has completed no iteration.
            ArchiveCorrupt: what is stored is not what was committed, or no run of moe-replay.
        """
        document, config = _read_document(self._store)
        # Before anything of them is read: what is below the newest of these is complete already.
        begun = self._store.iterations()
        with ThreadPoolExecutor(_PARALLEL_ITERATIONS) as pool:
            found = pool.map(lambda iteration: self._iteration(iteration, extremes), begun)
            iterations = tuple(part for part in found if part is not None)
        if not iterations:
            raise ConfigError(
                f"run {self._store.run_id} has completed no iteration ({len(begun)} begun), so there is nothing to "
                f"report; wait for its first training, or go on with moe-replay resume {self._store.run_id}"
            )
        final = begun[-1] if settled is None else min(begun[-1], settled)
        self._final |= {(part.iteration, extremes): part for part in iterations if part.iteration < final}
        incomplete = tuple(sorted(set(begun) - {part.iteration for part in iterations}))
        return _results_of(self._store.run_id, document, config, iterations, incomplete)

    def _iteration(self, iteration: int, extremes: bool) -> IterationResults | None:
        return self._final.get((iteration, extremes)) or _read_iteration(self._store, iteration, extremes)


def _results_of(
    run_id: str,
    document: _Document,
    config: dict[str, Any],
    iterations: tuple[IterationResults, ...],
    incomplete: tuple[int, ...],
) -> RunResults:
    settings = document.config
    return RunResults(
        run_id=run_id,
        method=one_line(iterations[-1].method or settings.method.name),
        seed=settings.seed,
        mini_steps=settings.training.mini_steps,
        model=one_line(settings.model.path),
        config=config,
        sources={
            "model": document.model_sha256,
            "data.train": document.train_sha256,
            **{f"benchmark {one_line(name)}": sha256 for name, sha256 in document.benchmarks_sha256.items()},
        },
        iterations=iterations,
        incomplete=incomplete,
    )


def _read_document(store: RunStore) -> tuple[_Document, dict[str, Any]]:
    document = store.read_run()
    if IMPORTS_KEY in document:
        raise ConfigError(f"run {store.run_id} holds routes that were imported and was never trained; leave it out")
    try:
        return _Document.model_validate(document), document["config"]
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:4])
        raise ArchiveCorrupt(
            f"run.json of {store.name} is not of a training run: {keys} missing or of the wrong kind; restore it, or "
            "leave this run out"
        ) from None


def _read_iteration(store: RunStore, iteration: int, extremes: bool) -> IterationResults | None:
    """None without a training."""
    training = store.committed("training", iteration)
    if training is None:
        return None
    others = (store.committed(stage, iteration) for stage in STAGES if stage != "training")
    metrics = stage_metrics(store, training)
    for artifact in others:
        metrics |= stage_metrics(store, artifact) if artifact else {}
    there = {stored.path for stored in training.kept}
    label = training.commit.attributes.get("method")
    return IterationResults(
        iteration=iteration,
        method=label if isinstance(label, str) else None,
        metrics=metrics,
        routing=_read_routing(training) if ROUTING_FILE in there else None,
        extremes=ExtremeCurve.of(read_log_probs(training)) if extremes and LOG_PROBS_FILE in there else None,
    )


def _read_routing(training: Artifact) -> RoutingStatistics:
    try:
        return RoutingStatistics.model_validate_json(training.read_bytes(ROUTING_FILE))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ArchiveCorrupt(
            f"object {training.name}/{ROUTING_FILE} holds no routing statistics: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; read it with the moe-replay that wrote it, or leave "
            f"run {training.commit.run_id} out"
        ) from error


def one_line(text: str) -> str:
    """Text of a run as it may be shown on a terminal or in a figure: one line, nothing that controls either."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:_LONGEST_LINE]
