"""Going on with a run under another config: what may change, and how that is written down."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.layout import ABOUT_KEY
from moe_replay.config import RunConfig
from moe_replay.dotted import dotted
from moe_replay.errors import ConfigError
from moe_replay.plan import CHANGES_KEY, ConfigChange, RunPlan
from moe_replay.sections import EvaluationConfig
from moe_replay.stages.completion import missing_stages

CHANGEABLE = ("iterations", "evaluation")
"""Keys, or sections of them, on which nothing that is trained from depends."""
_NO_PART_OF_A_RUN = {"storage": {"root"}, "resources": True, "stages": True, "tracking": True, "alarm": True}
"""Where a run's artifacts are reached, what computes them, how its stages are retried and how it is watched: changes
freely."""
_ABSENT = "absent"


def check_changeable(keys: Sequence[str]) -> None:
    """Raise ConfigError unless a run may go on with these dotted keys changed."""
    known = {*CHANGEABLE, *(f"evaluation.{name}" for name in EvaluationConfig.model_fields)}
    for key in keys:
        if key not in known and not key.startswith(("evaluation.benchmarks.", "evaluation.samples_of.")):
            raise ConfigError(
                f"{key!r} can't be allowed to change: only iterations, evaluation and the keys of that section can, on "
                "which nothing that is trained depends; with any other the run's artifacts would no longer be a "
                "function of one config: fork it (moe-replay fork), or start a new run"
            )


def require_same_config(store: RunStore, wanted: RunConfig, allowed: Sequence[str]) -> None:
    """Refuse to go on with a run under another config, but for the `allowed` keys. Changes nothing.

    Raises ConfigError with the old and new value of each key that differs, and what to do about it; also for fewer
    iterations than the run has begun.
    """
    check_changeable(allowed)
    plan, run_id = RunPlan.stored(store), store.run_id
    found = _differences(plan.config, wanted)
    refused = {key: values for key, values in found.items() if not _is_among(key, allowed)}
    if refused:
        told = ", ".join(f"{key} ({_shown(old)} -> {_shown(new)})" for key, (old, new) in sorted(refused.items()))
        changeable = sorted(key for key in refused if _is_among(key, CHANGEABLE))
        fixed = sorted(refused.keys() - set(changeable))
        ways = []
        if changeable:
            allow = "--allow-config-change, or a deployment's allow_config_change, for each"
            ways.append(f"to change {', '.join(changeable)}, give {allow}")
        if fixed:
            ways.append(
                f"{', '.join(fixed)} can't change, or the run's artifacts would no longer be a function of one config: "
                f"fork the run (moe-replay fork {run_id} --iteration N --set key=value)"
            )
        raise ConfigError(
            f"run {run_id} exists with another config: {told}; to go on with it use the config it has "
            f"(moe-replay resume {run_id}, or a new run of the deployment: a retried flow run keeps its parameters), "
            f"or give another name; {'; '.join(ways)}"
        )
    begun = _begun(store)
    if wanted.iterations < begun:
        raise ConfigError(
            f"iterations = {wanted.iterations}, but run {run_id} has begun {begun}, and what is committed is not taken "
            f"back; give at least {begun}"
        )


def changed_document(
    store: RunStore, wanted: RunConfig, benchmarks_sha256: Mapping[str, str], allowed: Sequence[str]
) -> dict[str, Any]:
    """`run.json` with what `require_same_config` let pass, and what there was before; as it is for no change.

    The benchmarks' checksums change too, of those that are `allowed` to. Writes nothing.
    """
    document = store.read_run()
    plan, known = RunPlan.of(store, document), document["benchmarks_sha256"]
    keys = {key for key in _differences(plan.config, wanted) if _is_among(key, allowed)}
    files = {name: sha256 for name, sha256 in benchmarks_sha256.items() if known.get(name, sha256) != sha256}
    may_change = {name for name in files if _is_among(f"evaluation.benchmarks.{name}", allowed)}
    if not keys and not may_change:
        return document
    before, after = plan.config.model_dump(mode="json"), wanted.model_dump(mode="json")
    sections = sorted({key.partition(".")[0] for key in keys})
    change = ConfigChange(
        on=datetime.now(UTC).replace(microsecond=0),
        since=_since(store, plan),
        keys=tuple(sorted(keys | {f"evaluation.benchmarks.{name} (its content)" for name in may_change})),
        before={section: before[section] for section in sections},
        benchmarks_sha256=known,
    )
    kept = {name: known[name] for name in files.keys() - may_change}
    about = document.get(ABOUT_KEY, {})
    changes = [*about.get(CHANGES_KEY, []), change.model_dump(mode="json")]
    return {
        **document,
        "config": document["config"] | {section: after[section] for section in sections},
        "benchmarks_sha256": {**benchmarks_sha256, **kept},
        ABOUT_KEY: {**about, CHANGES_KEY: changes},
    }


def _differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each key that differs."""
    before, after = (dotted(one.model_dump(mode="json", exclude=_NO_PART_OF_A_RUN)) for one in (old, new))
    return {
        key: (before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in before | after
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    }


def _is_among(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(value: Any) -> str:
    return value if value is _ABSENT else repr(value)


def _begun(store: RunStore) -> int:
    """The number of the iteration after the last that was begun.

    A rollout alone begins none while the iteration before is not trained: it was one step off, and does no harm.
    """
    for n in reversed(store.iterations()):
        committed = {one.stage for one in store.status(n) if one.state == "committed"}
        is_ahead = committed == {"rollout"} and n > 0 and store.commit_of("training", n - 1) is None
        if committed and not is_ahead:
            return n + 1
    return 0


def _since(store: RunStore, plan: RunPlan) -> int:
    """The first iteration that is not complete."""
    since = _begun(store)
    while since - 1 in plan.iterations and missing_stages(store, plan, since - 1):
        since -= 1
    return since
