"""Counterfactual replay: other methods' routes on the stored tokens of one rollout, without rolling out again.

The policy that the iteration trains gives each method's routes and its log-probs under them; a later checkpoint then
says how far its routers have moved away from each. Where the batch was sampled by an older one (one step off, partial
rollouts), the difference of its log-probs from the rollout's holds staleness too. Runs in the training engine's process
and changes nothing of the run.

Shapes: N sequences, S response tokens of the longest, T tokens of a mini-batch, L MoE layers, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_replay.archive.artifacts import Artifact
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.layout import RunLayout
from moe_replay.archive.routes import RouteArchive
from moe_replay.engines.process import Progress
from moe_replay.engines.training import Pass, TrainingEngine
from moe_replay.methods import Method
from moe_replay.reports.counterfactuals import Counterfactual, RoutesTried
from moe_replay.routing.metrics import extreme_fraction, kl_estimates, topk_agreement
from moe_replay.routing.predictor import EvolutionPredictor
from moe_replay.stages.old_log_probs import by_sequence, captured_routes
from moe_replay.stages.predictor import read_predictors, refit
from moe_replay.stages.replayable import committed, is_predicted, require_replayable
from moe_replay.stages.responses import Responses
from moe_replay.stages.route_observation import Traces, join
from moe_replay.stages.run import Run
from moe_replay.stages.samples import read_answers


def replay_counterfactually(
    engine: TrainingEngine,
    progress: Progress,
    run: Run,
    iteration: int,
    checkpoint: ArtifactRef,
    methods: Sequence[Method],
) -> Counterfactual:
    """Hold the routes that each of `methods` would have replayed against `checkpoint`.

    Where the rollout itself was predicted, its own routes are PR2's. Elsewhere predicted routes are those of the
    trainer's routers under the predictor that the iteration before left, or would have left; the inference engine's own
    would differ from them by its rounding.

    Args:
        engine: of the run's model; which weights it holds does not matter.
        progress: told of mini-batches.
        run: whose rollout, routes and policies are stored.
        iteration: whose rollout is taken.
        checkpoint: a training of the run.
        methods: each with a route source, by different labels.

    Raises:
        ConfigError: as `require_replayable`; or what a predictor is read or fitted from was removed by retention.
        ArchiveCorrupt, RoutingMismatch: what is stored is not as committed, or not of this model.
    """
    rollout = require_replayable(run.store(), iteration, methods)
    predicted = is_predicted(rollout)
    tried = [_Tried(method, predicted) for method in methods]
    needed = any(one.method.predictor and not one.is_captured for one in tried)
    predictor = _predictor(engine, run, iteration) if needed else None
    replay = _Replay(engine, run, Responses.of(read_answers(rollout)), predictor)
    replay.route_all(tried, _trained(run, iteration), committed(run.store(), "routes", iteration), progress)
    replay.judge_all(tried, checkpoint, progress)
    place = RunLayout.place_of(checkpoint.uri)
    assert place is not None
    return Counterfactual(
        run_id=run.run_id,
        iteration=iteration,
        checkpoint=place[0],
        layers=engine.layers,
        layers_predicted=None if predictor is None else len(predictor.weights),
        methods={one.method.label: one.summary(replay.responses) for one in tried},
    )


def _trained(run: Run, iteration: int) -> ArtifactRef:
    """The policy that an iteration trains; a rollout one step off is of the one before."""
    if iteration > run.plan.iterations.start:
        return committed(run.store(), "training", iteration - 1).ref
    return run.forked_from.policy if run.forked_from else run.initial_policy


def _predictor(engine: TrainingEngine, run: Run, iteration: int) -> EvolutionPredictor:
    """What served, or would have served, the old pass or rollout of an iteration after the first.

    That is the run's own where it fitted one and retention left it, else one fitted now. Raises as `read_predictors`
    and `refit` do, and RoutingMismatch when it is of another model than the engine's.
    """
    store = run.store()
    artifact = store.committed("predictor", iteration - 1)
    kept = read_predictors(artifact, run.run_id, iteration - 1) if artifact else None
    if kept is None:
        kept = refit(store, run.config.predictor, iteration - 1, use_stored=True).predictors
    kept.used.require_model(engine.num_experts, engine.hidden_size, engine.layers)
    return kept.used


@dataclass
class _Tried:
    """What one method's routes gave, mini-batch by mini-batch."""

    method: Method
    predicted_rollout: bool
    """Whether the rollout was served under a predictor."""
    routes: list[Traces] = field(default_factory=list)
    old: list[Tensor] = field(default_factory=list)
    """Log-probs [n, S] of the policy before the update."""
    agreement_L: Tensor | float = 0.0
    """Sum over `tokens`, as the next."""
    coverage_gap_L: Tensor | float = 0.0
    forced_k3: float = 0.0
    """Sum over response tokens."""
    tokens: int = 0
    """With a route."""

    @property
    def is_captured(self) -> bool:
        """Whether the method's routes are those that the rollout was served by."""
        return self.method.route_source == "rollout" and self.method.predictor == self.predicted_rollout

    @property
    def has_mismatch(self) -> bool:
        """Whether the method would have sampled from the policy that did: predicted gates make another of it."""
        predicts = self.method.route_source == "rollout" and self.method.predictor
        return predicts == self.predicted_rollout

    def summary(self, responses: Responses) -> RoutesTried:
        """Means over the whole batch, after its last mini-batch was judged."""
        assert isinstance(self.agreement_L, Tensor)
        assert isinstance(self.coverage_gap_L, Tensor)
        old_NS, sampled_NS, mask_NS = torch.cat(self.old), responses.rollout_NS, responses.mask_NS
        gap_L = self.coverage_gap_L / self.tokens
        return RoutesTried(
            kl_k3=kl_estimates(sampled_NS, old_NS, mask_NS)[1] if self.has_mismatch else None,
            extreme_fraction=extreme_fraction(old_NS, sampled_NS, mask_NS) if self.has_mismatch else None,
            agreement_L=tuple((self.agreement_L / self.tokens).tolist()),
            coverage_gap_L=tuple(gap_L.tolist()) if gap_L.isfinite().all() else (),
            forced_kl_k3=self.forced_k3 / int(mask_NS.sum()),
        )


class _Replay:
    """One rollout batch in the training engine: routed under the policy before, then judged under the one after."""

    def __init__(
        self, engine: TrainingEngine, run: Run, responses: Responses, predictor: EvolutionPredictor | None
    ) -> None:
        """`predictor` is needed by methods whose predicted routes are not those captured."""
        self.responses = responses
        self._engine = engine
        self._run = run
        self._weights = predictor.weights if predictor else None
        self._parts = responses.parts(run.config.training.mini_steps)
        self._counted: list[Tensor] = []
        """By mini-batch, bool [T]: all methods are judged on the rows that the rollout has routes of, though the
        trainer's own passes would have the rest too."""

    def route_all(self, tried: Sequence[_Tried], policy: ArtifactRef, routes: Artifact, progress: Progress) -> None:
        """Choose each method's routes under the policy that the iteration trains, and score the batch under them."""
        archive = RouteArchive.open(routes)
        archive.require_tokens(self.responses.digests)
        self._hold(policy)
        captured_parts = captured_routes(self._engine, archive, self._parts)
        for done, (part, captured) in enumerate(zip(self._parts, captured_parts, strict=True), start=1):
            self._counted.append(join(captured)[1])
            for one in tried:
                self._route(part, captured, one)
            progress(done, 2 * len(self._parts), "mini-batches")

    def judge_all(self, tried: Sequence[_Tried], policy: ArtifactRef, progress: Progress) -> None:
        """Replay the routes of `route_all` under the policy after the update."""
        self._hold(policy)
        for number, part in enumerate(self._parts):
            live = self._score(part, None)
            for one in tried:
                self._judge(number, part, one, live)
            progress(len(self._parts) + number + 1, 2 * len(self._parts), "mini-batches")

    def _hold(self, policy: ArtifactRef) -> None:
        """Load the weights of a policy alone: nothing is trained, so the optimizer's state is not read."""
        with self._run.policy(policy, with_optimizer=False) as held:
            self._engine.load(held.model_folder, f"{held.sha256} without its optimizer", is_checkpoint=False)

    def _route(self, part: slice, captured: Traces, one: _Tried) -> None:
        seen = self._score(part, captured if one.is_captured else None, predicts=one.method.predictor)
        one.routes.append(captured if one.is_captured else by_sequence(seen.own_TLK, captured))
        width = self.responses.mask_NS.shape[1]
        one.old.append(pad(seen.log_probs_NS, (0, width - seen.log_probs_NS.shape[1])))

    def _judge(self, number: int, part: slice, one: _Tried, live: Pass) -> None:
        routes, counted_T = one.routes[number], self._counted[number]
        seen = self._score(part, routes)
        agreement_TL = topk_agreement(join(routes)[0][counted_T], seen.live_TLK[counted_T].long())
        one.tokens += len(agreement_TL)
        one.agreement_L = one.agreement_L + agreement_TL.double().sum(0)
        one.coverage_gap_L = one.coverage_gap_L + seen.coverage_gap_TL[counted_T].double().sum(0)
        mask_NS = self.responses.mask_NS[part, : seen.log_probs_NS.shape[1]]
        _, k3 = kl_estimates(live.log_probs_NS, seen.log_probs_NS, mask_NS)
        one.forced_k3 += k3 * int(mask_NS.sum())

    def _score(self, part: slice, routes: Traces | None, predicts: bool = False) -> Pass:
        """Score a mini-batch under `routes`; or under the routers' own choice, predicted where asked."""
        temperature = self._run.config.rollout.temperature
        predictor = self._weights if predicts and routes is None else None
        return self._engine.score(self.responses.sequences[part], routes, temperature, predictor=predictor)
