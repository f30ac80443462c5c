"""Partial rollouts with vLLM in float32: responses that go on under other weights, against transformers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from models import reference, same_sets, write_perturbed
from rollout_calls import CONFIG

from moe_replay.archive.artifacts import Artifact
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.routes import RouteArchive
from moe_replay.config import RunConfig
from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.preparation import prepare
from moe_replay.stages.carrying import read_about, read_carried
from moe_replay.stages.routes import archive_routes
from moe_replay.stages.run import Run
from moe_replay.stages.samples import Sample, read_samples

EOS_ID = 1
TOLERANCE = 2e-5
CLEAR_MARGIN = 1e-4
PARTIAL = {"prompts": 4, "responses": 3, "partial_response_tokens": 3, "oversampled_prompts": 4}


@dataclass
class Partial:
    """Three iterations of a run, the last under weights that have nothing to do with an update."""

    run: Run
    rollouts: list[Artifact]
    folders: list[Path]
    """The model of each weight version."""


def make_run(name: str, root: Path) -> Run:
    rollout = CONFIG.model_dump() | PARTIAL
    config = RunConfig.model_validate(
        {"rollout": rollout, "training": {"mini_steps": 1}, "storage": {"root": str(root)}}
    )
    return prepare(config, name, no_progress)


def commit_policy(run: Run, iteration: int, folder: Path) -> ArtifactRef:
    """A training artifact whose checkpoint is the model in `folder`."""
    writer = run.store().begin("training", iteration, {}, "digest")
    for file in sorted(folder.iterdir()):
        writer.write_bytes(f"checkpoint/huggingface/{file.name}", file.read_bytes())
    return writer.commit()


def roll_out(engine: EngineProcess, run: Run, folder: Path) -> list[Artifact]:
    """Iterations 0 and 1 under the run's model, which is trained in vain between them, 2 under that in `folder`.

    Nearly all answers take five tokens. So the first rollout has two rounds and leaves finished groups, with which the
    second is content after one round; what it leaves is cut at three tokens.
    """
    rollouts: list[Artifact] = []
    policies = [run.initial_policy, commit_policy(run, 0, run.model), commit_policy(run, 1, folder)]
    for iteration, policy in enumerate(policies):
        before = rollouts[-1].ref if rollouts else None
        stage = "moe_replay.stages.rollout:generate_rollouts"
        rollouts.append(run.open(engine.call(stage, no_progress, run, iteration, policy, None, before)))
    return rollouts


@pytest.fixture(scope="module")
def partial(rollout_engine, assets, tmp_path_factory) -> Partial:
    root = tmp_path_factory.mktemp("partial")
    other = write_perturbed(assets.model, root / "perturbed")
    run = make_run("partial", root / "runs")
    return Partial(run, roll_out(rollout_engine, run, other), [assets.model, assets.model, other])


@pytest.fixture(scope="module")
def continued(partial) -> list[Sample]:
    """Samples of the last iteration with tokens of both weights."""
    return [sample for sample in read_samples(partial.rollouts[2]) if set(sample.weight_versions or []) == {1, 2}]


def routed_under(sample: Sample) -> list[int]:
    """The weight version of each row that has a route: that of the token sampled from it."""
    assert sample.weight_versions is not None
    return [sample.weight_versions[0]] * (len(sample.prompt_ids) - 1) + sample.weight_versions


def test_batches_are_whole_and_what_is_carried_goes_on_at_the_head_of_the_next(partial, continued):
    _, second, third = partial.rollouts
    for rollout in partial.rollouts:
        samples = list(read_samples(rollout))
        assert [(sample.sequence_id, sample.group) for sample in samples] == [(n, n // 3) for n in range(12)]
    left = read_carried(second, partial.run.train.open())
    assert len(left) == 4
    prompts = partial.run.train.open().read_on(0, 16, partial.run.seed("data"))
    assert [group.prompt.row for group in left] == [prompts[group.drawn].row for group in left]
    about = read_about(third)
    assert about is not None
    assert about.prompts_drawn == 16
    assert about.origins[1].weights_sha256 == second.commit.inputs["policy"].sha256
    assert about.origins[2].weights_sha256 == third.commit.inputs["policy"].sha256
    assert third.commit.inputs["carried"] == second.ref
    assert len(continued) > 6


def test_what_was_sampled_before_stays_as_it_was_recorded(partial, continued):
    left = read_carried(partial.rollouts[1], partial.run.train.open())
    recorded = {(group.prompt.row, tuple(one.response.response_ids)): one for group in left for one in group.begun}
    for sample in continued:
        kept = (sample.weight_versions or []).count(1)
        before = recorded[sample.prompt_row, tuple(sample.response_ids[:kept])]
        assert not before.finished
        assert sample.log_probs[:kept] == before.response.log_probs
        rows = len(sample.prompt_ids) + kept - 1
        np.testing.assert_array_equal(sample.trace.ids_TLK[:rows], before.response.trace.ids_TLK[:rows])


def test_log_probs_and_routes_are_those_of_the_weights_that_sampled_each_token(partial, continued):
    others = compared = 0
    for sample in continued:
        expected = [reference(folder, sample.prompt_ids, sample.response_ids, 1.0) for folder in partial.folders]
        versions, rows = np.array(sample.weight_versions), np.array(routed_under(sample))
        by_token = np.where(versions == 2, expected[2].log_probs_S, expected[1].log_probs_S)
        np.testing.assert_allclose(sample.log_probs, by_token, rtol=0, atol=TOLERANCE)
        assert sample.trace.valid_T.tolist() == [True] * len(rows) + [False]
        for version, one in ((1, expected[1]), (2, expected[2])):
            same_TL = same_sets(sample.trace.ids_TLK, one.ids_TLK)[:-1]
            clear_TL = (one.router_margin_TL > CLEAR_MARGIN)[:-1]
            assert same_TL[(rows == version)[:, None] & clear_TL].all()
            others += int((~same_TL[rows != version]).sum())
            compared += same_TL[rows != version].size
    # Routed again as a prefix, the tokens would have had other experts.
    assert others > 0.2 * compared


def test_texts_are_decoded_whole_and_scored(partial, continued):
    for sample in continued:
        said = sample.response_ids if sample.truncated else sample.response_ids[:-1]
        assert len(sample.text) == len(said)
        assert sample.truncated == (sample.response_ids[-1] != EOS_ID)
        assert len(sample.response_ids) == CONFIG.max_response_tokens or not sample.truncated


def test_staleness_and_the_archive_tell_the_weights_of_every_token(partial):
    _, _, rollout = partial.rollouts
    archive = RouteArchive.open(partial.run.open(archive_routes(partial.run, 2, rollout.ref)))
    about, samples = read_about(rollout), list(read_samples(rollout))
    assert about is not None
    for sample, tokens in zip(samples, archive.sequence_tokens(0, len(samples)), strict=True):
        origins = [origin for part, origin in archive.origins_of(tokens) for _ in range(part.start, part.stop)]
        rows = routed_under(sample)
        assert origins == [about.origins[version] for version in [*rows, rows[-1]]]
    staleness = [2 - version for sample in samples for version in sample.weight_versions or []]
    assert rollout.commit.metrics["rollout/staleness_mean"] == pytest.approx(np.mean(staleness))
    assert rollout.commit.metrics["rollout/carried_tokens"] == pytest.approx(np.mean(np.array(staleness) > 0))
    assert rollout.commit.metrics["rollout/staleness_max"] == max(staleness)
    assert partial.rollouts[0].commit.metrics["rollout/staleness_max"] == 0.0


def test_the_same_run_gives_the_same_bytes(partial, rollout_engine, tmp_path):
    again = roll_out(rollout_engine, make_run("again", tmp_path / "runs"), partial.folders[2])
    assert again[0].commit.objects == partial.rollouts[0].commit.objects
    # One object of the others names policies, whose commits name the run.
    for one, other in zip(again[1:], partial.rollouts[1:], strict=True):
        paths = [{stored.path: stored.sha256 for stored in a.commit.objects} for a in (one, other)]
        assert {path for path in paths[0] if paths[0][path] != paths[1].get(path)} == {"partial.json"}
