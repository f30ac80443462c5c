"""Replayed training: the mini-steps of one iteration under the method's routes. Runs in the training engine's process.

Shapes: N sequences of the rollout batch, S response tokens of the longest, T tokens of a mini-batch, L MoE layers,
K experts per token.
"""

import json

import numpy as np
import torch

from moe_replay.archive.artifacts import StageWriter
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.layout import CHECKPOINT_FOLDER
from moe_replay.archive.log_probs import write_log_probs
from moe_replay.archive.routes import RouteArchive
from moe_replay.engines.process import Progress
from moe_replay.engines.training import Pass, TrainingEngine
from moe_replay.errors import ReplayError, StabilityAlarm
from moe_replay.places import as_argument
from moe_replay.routing.metrics import policy_health
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.routing.statistics import ROUTING_FILE
from moe_replay.stages.decisions import BatchAlarms, Decided
from moe_replay.stages.evolution import EvolutionRecorder, Positions
from moe_replay.stages.old_log_probs import Batch, captured_routes, old_log_prob_pass
from moe_replay.stages.responses import Responses
from moe_replay.stages.route_observation import Metrics, RouteObservation, Traces
from moe_replay.stages.run import Run
from moe_replay.stages.samples import read_answers


def train_replayed(
    engine: TrainingEngine,
    progress: Progress,
    run: Run,
    iteration: int,
    policy: ArtifactRef,
    rollout: ArtifactRef,
    routes: ArtifactRef,
    predictor: ArtifactRef | None = None,
) -> ArtifactRef:
    """Take the iteration's κ optimizer steps from `policy` and commit checkpoint, evolution and metrics.

    `predictor` is given where the method predicts the routes of the old log-prob pass. A batch on which the stability
    alarm was raised is treated as was decided; one that is skipped leaves the policy as it was.

    Raises:
        StabilityAlarm: the mismatch is beyond a bound and nothing was decided; engine and storage are as before.
        RoutingMismatch: the routes or the predictor are not those of the rollout's tokens or of this model.
        ArchiveCorrupt: an input is not as committed.
    """
    inputs = {"policy": policy, "rollout": rollout, "routes": routes}
    inputs |= {"predictor": predictor} if predictor else {}
    writer = run.store().begin("training", iteration, inputs, run.digest("training"))
    torch.manual_seed(run.seed("training", iteration))
    if engine.weights != policy.sha256:
        with run.policy(policy, with_optimizer=True) as held:
            engine.load(held.folder, held.sha256, held.is_checkpoint)
    responses = Responses.of(read_answers(run.open(rollout)))
    archive = RouteArchive.open(run.open(routes))
    archive.require_model(engine.num_experts, engine.top_k, engine.layers)
    archive.require_rollout(rollout)
    archive.require_tokens(responses.digests)
    alarms = BatchAlarms(run.store(), iteration, rollout)
    decided = Decided.of(run.config, alarms.decisions())
    observation = RouteObservation(engine.layers, engine.num_experts)
    recorder = None
    if run.config.records_evolution and not decided.skips:
        seed = run.seed("evolution", iteration)
        recorder = EvolutionRecorder(writer, engine, run.config, responses, archive, policy.sha256, seed)
    predicted = _read_predictor(run, engine, iteration, predictor) if decided.config.method.predictor else None
    batch, metrics = old_log_prob_pass(engine, decided.config, responses, archive, observation, recorder, predicted)
    _require_finite(metrics)
    if not decided.is_final:
        _require_stable(run, alarms, metrics, writer)
    steps = [] if decided.skips else _mini_steps(engine, decided, batch, archive, observation, recorder, progress)
    metrics |= observation.metrics() | _summarize(steps) | decided.metrics()
    if predicted:
        metrics["predictor/layers_steered"] = float(len(predicted.weights))
    _require_finite(metrics)
    _write(writer, run, engine, batch, observation, steps)
    if recorder:
        recorder.close()
    attributes = {"method": run.config.method.label, **decided.attributes()}
    if engine.micro_batch_tokens != run.config.training.micro_batch_tokens:
        # Memory did not do for the config's: sums are rounded otherwise than in a run where it does.
        attributes["micro_batch_tokens"] = engine.micro_batch_tokens
    for key in ("world_size", "sequence_parallel_size", "expert_parallel_size", "pipeline_parallel_size"):
        if (ranks := getattr(run.config.resources, f"training_{key}")) > 1:
            attributes[f"training_{key}"] = ranks  # which rounds sums otherwise too
    ref = writer.commit(metrics=metrics, attributes=attributes)
    engine.weights = ref.sha256
    return ref


def _read_predictor(
    run: Run, engine: TrainingEngine, iteration: int, ref: ArtifactRef | None
) -> EvolutionPredictor | None:
    if ref is None:
        return None
    with run.predictor(ref, iteration) as file:
        predictor = EvolutionPredictor.load(file)
    predictor.require_model(engine.num_experts, engine.hidden_size, engine.layers)
    return predictor


def _require_stable(run: Run, alarms: BatchAlarms, metrics: Metrics, writer: StageWriter) -> None:
    """Stop before a batch whose mismatch is beyond a bound, leaving nothing behind but the alarm."""
    excess = run.config.alarm.excess(metrics)
    if excess is None:
        return
    writer.discard()
    alarm = alarms.raise_alarm(excess)
    named = as_argument(run.run_id, run.config.storage.root)
    stale = run.open(alarms.rollout).commit.metrics.get("rollout/staleness_max", 0.0)
    holds = f" (tokens of the batch are up to {stale:g} updates old: the figure holds that too)" if stale else ""
    raise StabilityAlarm(
        f"iteration {alarm.iteration} of run {run.run_id} stopped before it trained: {alarm.reason}{holds}; decide "
        f"what becomes of the batch with moe-replay resume {named} --decide "
        f"{'|'.join(alarm.actions(run.config.method))}",
        *excess,
    )


def _mini_steps(
    engine: TrainingEngine,
    decided: Decided,
    batch: Batch,
    archive: RouteArchive,
    observation: RouteObservation,
    recorder: EvolutionRecorder | None,
    progress: Progress,
) -> list[Metrics]:
    """The optimizer steps of the iteration, each on its mini-batch, and what each saw."""
    number = decided.config.training.mini_steps
    parts, steps = batch.responses.parts(number), []
    # Without replay the reference is what served the token at rollout, as in PR2's comparison of GRPO.
    references = iter(batch.own) if batch.own is not None else captured_routes(engine, archive, parts)
    for part, reference in zip(parts, references, strict=True):
        step = len(steps) + 1
        sampled = recorder.sampled(step) if recorder else None
        seen, metrics = _mini_step(engine, decided, batch, part, reference, sampled)
        steps.append(metrics | observation.add_mini_step(reference, seen))
        if recorder:
            recorder.after(step, seen)
        progress(step, number, "mini-steps")
    return steps


def _mini_step(
    engine: TrainingEngine,
    decided: Decided,
    batch: Batch,
    part: slice,
    reference: Traces,
    sampled: Positions | None,
) -> tuple[Pass, Metrics]:
    """One optimizer step on a part of the batch, measured before it changes the weights."""
    config = decided.config
    replays = config.method.route_source != "none"
    seen = engine.step(
        batch.responses.sequences[part],
        reference if replays else None,
        batch.old_NS[part],
        batch.advantages_NS[part],
        batch.importance_NS[part] if batch.importance_NS is not None else None,
        config.method,
        config.rollout.temperature,
        reference=reference,
        sampled=sampled,
        lr_factor=decided.lr_factor,
    )
    width = seen.log_probs_NS.shape[1]
    health = policy_health(
        seen.log_probs_NS,
        batch.old_NS[part, :width],
        batch.advantages_NS[part, :width],
        batch.responses.mask_NS[part, :width],
        (config.method.clip_low, config.method.clip_high),
        whole_sequences=config.method.policy_loss == "gspo",
    )
    return seen, {**health, "policy/loss": seen.loss, "policy/grad_norm": seen.grad_norm}


def _write(
    writer: StageWriter,
    run: Run,
    engine: TrainingEngine,
    batch: Batch,
    observation: RouteObservation,
    steps: list[Metrics],
) -> None:
    """The next policy, and what was seen on the way to it."""
    with run.scratch() as folder:
        engine.save(folder)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            writer.take_file(f"{CHECKPOINT_FOLDER}/{file.relative_to(folder).as_posix()}", file)
    writer.write_bytes("metrics.json", json.dumps({"mini_steps": steps}, sort_keys=True, indent=2).encode())
    writer.write_bytes(ROUTING_FILE, observation.statistics().model_dump_json().encode())
    batch_of = batch.responses
    rollout, old = (batch_of.of_tokens(values_NS) for values_NS in (batch_of.rollout_NS, batch.old_NS))
    write_log_probs(writer, batch_of.sequence_ids, rollout, old)


def _summarize(steps: list[Metrics]) -> Metrics:
    """The iteration's metrics from its mini-steps': means, the largest ratio, and the agreement of each step."""
    if not steps:
        return {}
    metrics = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
    metrics["policy/ratio_max"] = max(step["policy/ratio_max"] for step in steps)
    for number, step in enumerate(steps, start=1):
        metrics[f"routing/agreement_step_{number}"] = step["routing/agreement"]
    return metrics


def _require_finite(metrics: Metrics) -> None:
    """A policy that diverged is not committed, or every iteration after would start from it."""
    diverged = {key: value for key, value in metrics.items() if not np.isfinite(value)}
    if diverged:
        raise ReplayError(
            f"training diverged: {', '.join(f'{key} = {value}' for key, value in sorted(diverged.items()))}; "
            "nothing was committed: lower training.learning_rate, or replay routes (method r3), and start a new run"
        )
