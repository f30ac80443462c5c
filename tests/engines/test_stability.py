"""The stability alarm in the training stage: verl on a tiny random model, on a batch served under foreign routes."""

from pathlib import Path
from typing import Any

import pytest
from trainer import BATCH, LAYERS, E, K, Trainer, foreign_routes
from training_calls import make_config

from moe_replay.archive.artifacts import Artifact, ArtifactRef
from moe_replay.archive.evolution import has_evolution
from moe_replay.errors import ConfigError, StabilityAlarm
from moe_replay.stages.decisions import BatchAlarms, is_skipped
from moe_replay.stages.routes import archive_routes
from moe_replay.stages.run import DataFile, Run
from moe_replay.stages.samples import Sample, write_samples

SEQUENCES = 8
TRACES = foreign_routes()[:SEQUENCES]
ORIGIN = {"source": "vllm", "engine_version": "0", "dtype": "float32", "layers": list(LAYERS)}
BOUND = {"kl_k3": 1e-3}
"""Far above the mismatch under the rollout's routes, which is rounding, and far below that under the trainer's own."""


class Bench:
    """Runs of one batch, which was sampled under foreign routes, on one engine."""

    def __init__(self, trainer: Trainer, model: Path, root: Path):
        self.trainer, self.model, self.root = trainer, model, root
        self.trainer.open_model(model, make_config())
        self.log_probs = trainer.score(BATCH, foreign_routes()).log_probs

    def run(self, name: str, method: str = "grpo", alarm: dict[str, Any] | None = None, **training: Any) -> Run:
        """A run with a clean engine and nothing committed."""
        config = make_config(
            {"mini_steps": 2, **training},
            method=method,
            rollout={"prompts": SEQUENCES // 2, "responses": 2},
            evolution={"record": True},
            alarm=alarm or {},
        )
        self.trainer.open_model(self.model, config)
        nowhere = DataFile(path=self.root / "train.parquet", sha256="0" * 64)
        return Run(
            run_id="run",
            root=str(self.root / name),
            home=self.root / "home",
            config=config,
            model=self.model,
            model_sha256="a" * 64,
            train=nowhere,
            benchmarks={},
        )

    def roll_out(self, run: Run, iteration: int, policy: ArtifactRef) -> tuple[ArtifactRef, ArtifactRef]:
        """The batch as this iteration's rollout, and its routes."""
        writer = run.store().begin("rollout", iteration, {"policy": policy}, run.digest("rollout"))
        write_samples(writer, [self.sample(number) for number in range(SEQUENCES)])
        origin = {**ORIGIN, "num_experts": E, "top_k": K, "weights_sha256": policy.sha256}
        rollout = writer.commit(attributes=origin)
        return rollout, archive_routes(run, iteration, rollout)

    def sample(self, number: int) -> Sample:
        return Sample(
            sequence_id=number,
            prompt_row=number // 2,
            group=number // 2,
            data_source="made up",
            prompt_ids=BATCH.prompts[number],
            response_ids=BATCH.responses[number],
            log_probs=self.log_probs[number].tolist(),
            text="",
            reward=float(number % 2),
            truncated=False,
            trace=TRACES[number],
        )

    def train(self, run: Run, iteration: int = 0, policy: ArtifactRef | None = None, *decided: str) -> Artifact:
        """Roll out and train, deciding on each alarm in turn."""
        policy = policy or run.initial_policy
        rollout, routes = self.roll_out(run, iteration, policy)
        for action in decided:
            with pytest.raises(StabilityAlarm):
                self.trainer.train_stage(run, iteration, policy, rollout, routes)
            BatchAlarms(run.store(), iteration, rollout).decide(run.config, action, "person")
        return run.open(self.trainer.train_stage(run, iteration, policy, rollout, routes))


@pytest.fixture(scope="module")
def bench(bench, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Trainer(bench), model, tmp_path_factory.mktemp("stability"))


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Artifact:
    """The training of a run without bounds."""
    return bench.train(bench.run("undisturbed"))


def weights_of(training: Artifact) -> dict[str, str]:
    """Checksums of what the checkpoint holds."""
    return {stored.path: stored.sha256 for stored in training.commit.objects if "checkpoint" in stored.path}


def optimizer_of(training: Artifact) -> dict[str, str]:
    return {path: sha256 for path, sha256 in weights_of(training).items() if "optimizer" in path}


def test_the_alarm_stops_before_anything_is_changed_and_says_why(bench: Bench, undisturbed: Artifact) -> None:
    run = bench.run("stopped", alarm=BOUND)
    rollout, routes = bench.roll_out(run, 0, run.initial_policy)
    with pytest.raises(
        StabilityAlarm, match=r"kl_k3 = .* is beyond the bound of 0.001.*--decide train\|skip"
    ) as caught:
        bench.trainer.train_stage(run, 0, run.initial_policy, rollout, routes)

    error = caught.value
    assert (error.metric, error.bound, error.transient) == ("mismatch/kl_k3", 1e-3, False)
    assert error.value == undisturbed.commit.metrics["mismatch/kl_k3"]
    assert run.store().commit_of("training", 0) is None
    assert not list(Path(run.root).rglob("_attempt-*"))
    assert bench.trainer.name_of_weights() == run.model_sha256

    # With the bounds lifted it is as if there had been none, to the last byte.
    lifted = run.model_copy(update={"config": run.config.model_copy(update={"alarm": bench.run("x").config.alarm})})
    assert bench.trainer.train_stage(lifted, 0, run.initial_policy, rollout, routes) == undisturbed.ref


def test_a_batch_within_its_bounds_is_trained_as_without_any(bench: Bench, undisturbed: Artifact) -> None:
    within = bench.train(bench.run("within", alarm={"kl_k3": 1e3, "extreme_fraction": 1.0}))
    assert within.ref == undisturbed.ref


def test_a_batch_can_be_trained_on_all_the_same(bench: Bench, undisturbed: Artifact) -> None:
    trained = bench.train(bench.run("trained", alarm=BOUND), 0, None, "train")
    assert weights_of(trained) == weights_of(undisturbed)
    assert trained.commit.metrics == {**undisturbed.commit.metrics, "alarm/raised": 1.0}
    assert trained.commit.attributes == {"method": "grpo", "alarm_decisions": ["train"]}


def test_a_skipped_batch_leaves_policy_and_optimizer_as_they_were(bench: Bench, undisturbed: Artifact) -> None:
    run = bench.run("skipped", alarm=BOUND)
    first = bench.train(run, 0, None, "train")
    skipped = bench.train(run, 1, first.ref, "skip")
    assert weights_of(skipped) == weights_of(first)
    assert (is_skipped(first), is_skipped(skipped)) == (False, True)
    assert (has_evolution(first), has_evolution(skipped)) == (True, False)
    metrics = skipped.commit.metrics
    assert metrics["mismatch/kl_k3"] > 1e-3
    assert "policy/grad_norm" not in metrics
    assert skipped.read_bytes("metrics.json") == b'{\n  "mini_steps": []\n}'


@pytest.mark.parametrize("engine", ["kept", "fresh"])
def test_a_run_whose_first_batch_was_skipped_goes_on_from_the_model(bench: Bench, undisturbed, engine: str) -> None:
    run = bench.run(f"skipped-first-{engine}", alarm=BOUND)
    skipped = bench.train(run, 0, None, "skip")
    assert optimizer_of(skipped).keys() == {"checkpoint/optimizer/scalars.json"}
    if engine == "fresh":
        bench.trainer.open_model(bench.model, run.config)
    assert weights_of(bench.train(run, 1, skipped.ref, "train")) == weights_of(undisturbed)


def test_a_lower_learning_rate_is_that_of_this_iteration_alone(bench: Bench, undisturbed: Artifact) -> None:
    run = bench.run("lower", alarm={**BOUND, "lr_factor": 0.25}, learning_rate=1e-2)
    lower = bench.train(run, 0, None, "lower_lr")
    expected = weights_of(bench.train(bench.run("low", learning_rate=0.25 * 1e-2)))
    model = "checkpoint/huggingface/model.safetensors"
    assert weights_of(lower)[model] == expected[model] != weights_of(undisturbed)[model]
    scalars = "checkpoint/optimizer/scalars.json"
    assert lower.read_bytes(scalars) == undisturbed.read_bytes(scalars)
    assert lower.commit.attributes["alarm_lr_factor"] == 0.25


def test_falling_back_trains_as_r3_does(bench: Bench) -> None:
    fallen = bench.train(bench.run("fallen", alarm=BOUND), 0, None, "fall_back")
    r3 = bench.train(bench.run("r3", method="r3", alarm=BOUND))
    assert weights_of(fallen) == weights_of(r3)
    assert fallen.commit.metrics == {**r3.commit.metrics, "alarm/raised": 1.0}
    assert has_evolution(fallen)


def test_a_batch_that_falls_back_and_is_beyond_its_bound_still_is_decided_on_again(bench: Bench) -> None:
    run = bench.run("fallen-further", alarm={"kl_k3": 0.0})
    skipped = bench.train(run, 0, None, "fall_back", "skip")
    assert skipped.commit.attributes["alarm_decisions"] == ["fall_back", "skip"]
    assert skipped.commit.metrics["alarm/raised"] == 2
    assert skipped.commit.metrics["mismatch/kl_k3"] < 1e-3


def test_who_decided_does_not_change_the_bytes_and_a_decision_is_repeated(bench: Bench) -> None:
    refs = []
    for decided_by in ("rule", "person"):
        run = bench.run(f"by-{decided_by}", alarm=BOUND)
        rollout, routes = bench.roll_out(run, 0, run.initial_policy)
        with pytest.raises(StabilityAlarm):
            bench.trainer.train_stage(run, 0, run.initial_policy, rollout, routes)
        BatchAlarms(run.store(), 0, rollout).decide(run.config, "lower_lr", decided_by)
        # As after a kill: another process, and by now other settings of the alarm.
        changed = bench.run(f"by-{decided_by}", alarm={**BOUND, "lr_factor": 0.5, "rule": "skip"})
        refs.append(bench.trainer.train_stage(changed, 0, run.initial_policy, rollout, routes))
    assert refs[0] == refs[1]


def test_a_decision_on_another_batch_does_not_hold(bench: Bench) -> None:
    run = bench.run("other", alarm=BOUND)
    rollout, _ = bench.roll_out(run, 0, run.initial_policy)
    batch = BatchAlarms(run.store(), 0, rollout.model_copy(update={"sha256": "b" * 64}))
    with pytest.raises(ConfigError, match="waits for no decision"):
        batch.decide(run.config, "skip", "person")
