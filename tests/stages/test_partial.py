"""Partial rollouts: which groups are trained on and which carried, whatever the lengths of responses."""

import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from math import ceil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_replay.archive.artifacts import Artifact, RunStore
from moe_replay.archive.commits import ArtifactRef
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.routes import RouteArchive, RouteOrigin
from moe_replay.config import RunConfig
from moe_replay.config_reading import load_config, overridden
from moe_replay.engines.process import no_progress
from moe_replay.engines.rollout import Response
from moe_replay.errors import ArchiveCorrupt, ConfigError, RoutingMismatch
from moe_replay.plan import ForkPoint
from moe_replay.preparation import preflight, prepare
from moe_replay.routing.trace import RoutingTrace
from moe_replay.stages.carrying import PartialAbout, read_about, read_carried, route_changes, write_carried
from moe_replay.stages.partial import about_rollout, begin_rollout, requests_of, sample_until_whole, staleness_metrics
from moe_replay.stages.prompt_groups import PromptGroup
from moe_replay.stages.replayable import require_replayable, tellable_methods
from moe_replay.stages.rollout import make_sample
from moe_replay.stages.routes import archive_routes
from moe_replay.stages.run import Run
from moe_replay.stages.samples import read_samples, write_samples

LAYERS, EXPERTS = (0, 2), 16
PROMPT = [7, 8, 9]


def origin_of(version: int, predictor: str | None = None) -> RouteOrigin:
    return RouteOrigin(
        predictor_sha256=predictor,
        source="vllm",
        engine_version="0.28.0",
        dtype="bfloat16",
        weights_sha256=f"{version:064x}",
        layers=LAYERS,
        num_experts=EXPERTS,
        top_k=1,
    )


def route(version: int, token: int) -> int:
    """The expert that serves a token under the weights of a version."""
    return (5 * version + token) % EXPERTS


def stretch(begun: Sequence[int], most: int, length: int, version: int, prompt: list[int] = PROMPT) -> Response:
    """What an engine returns: tokens numbered through, up to the response's length; routes of what is fed at first."""
    new = list(range(len(begun), min(len(begun) + most, length)))
    first = len(prompt) + len(begun) - 1 if begun else 0
    ids_RLK = np.array([[[route(version, row)]] * len(LAYERS) for row in range(first, len(prompt) + new[-1])])
    return Response(
        prompt_ids=list(prompt),
        response_ids=new,
        log_probs=[-version - token / 64 for token in new],
        text="",
        truncated=new[-1] + 1 < length,
        trace=RoutingTrace.from_capture(ids_RLK.reshape(-1, len(LAYERS), 1), len(ids_RLK) + 1, EXPERTS, LAYERS),
    )


class Rollouts:
    """Rollouts of a run one after the other; a response of the group drawn i-th is as long as `lengths` say."""

    def __init__(self, run: Run, lengths: Sequence[Sequence[int]], steps_off: int = 0) -> None:
        self.run = run
        self.steps_off = steps_off
        self.lengths = lengths
        self.requests: list[tuple[int, int]] = []
        """(Seed, tokens so far) of all that was asked."""

    def length(self, drawn: int, member: int) -> int:
        of_group = self.lengths[drawn % len(self.lengths)]
        return of_group[member % len(of_group)]

    def next(self, iteration: int, before: Artifact | None) -> tuple[list[PromptGroup], Artifact]:
        """The groups trained on, and what was committed."""
        rollout, version = self.run.config.rollout, max(0, iteration - self.steps_off)
        assert rollout.partial_response_tokens is not None
        at_work = begin_rollout(self.run, iteration, before)

        def sample_round(number: int, unfinished: Sequence[tuple[PromptGroup, int]]) -> None:
            requests = requests_of(self.run, unfinished)
            self.requests += [(request.seed, len(request.begun)) for request in requests]
            for (group, member), request in zip(unfinished, requests, strict=True):
                assert request.max_new_tokens is not None
                length = self.length(group.drawn, member)
                new = stretch(request.begun, request.max_new_tokens, length, version)
                group.take(member, new, version, rollout.max_response_tokens)

        trained, left = sample_until_whole(at_work.groups, rollout.prompts, sample_round)
        writer = self.run.store().begin("rollout", iteration, {}, "digest")
        write_carried(writer, left, about_rollout(self.run, at_work, version, origin_of(version)))
        members = [(number, group, one) for number, group in enumerate(trained) for one in group.begun]
        write_samples(
            writer,
            [
                make_sample(i, number, group.prompt, one.response, one.weight_versions)
                for i, (number, group, one) in enumerate(members)
            ],
        )
        ref = writer.commit(attributes=origin_of(version).model_dump(mode="json"))
        return trained, self.run.open(ref)


@pytest.fixture
def run(config) -> Run:
    return prepare(config, "partial", no_progress)


def partial(run: Run, **rollout: int) -> Run:
    """The run with other settings, and a store in memory of its own."""
    changed = run.config.model_dump() | {"rollout": {**run.config.model_dump()["rollout"], **rollout}}
    changed["training"] = {"mini_steps": 1}
    return run.model_copy(
        update={
            "config": RunConfig.model_validate(changed),
            "root": f"memory://{uuid.uuid4().hex}",
        }
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_batch_is_whole_and_every_prompt_drawn_is_trained_on_once_and_soon(run, data):
    longest, prompts, responses = (data.draw(st.integers(*bounds)) for bounds in ((2, 9), (1, 3), (2, 3)))
    most, beside, steps_off = (data.draw(st.integers(*bounds)) for bounds in ((1, longest - 1), (1, 5), (0, 1)))
    of_group = st.lists(st.integers(1, longest), min_size=responses, max_size=responses)
    lengths = data.draw(st.lists(of_group, min_size=1, max_size=7))
    run = partial(
        run,
        prompts=prompts,
        responses=responses,
        max_response_tokens=longest,
        partial_response_tokens=most,
        oversampled_prompts=beside,
    )
    rollouts, before, seen = Rollouts(run, lengths, steps_off), None, []
    bound = max(0, ceil(longest / most) - 2) + ceil(beside / prompts) + steps_off
    for iteration in range(5):
        trained, before = rollouts.next(iteration, before)
        assert len(trained) == prompts
        carried = read_carried(before, run.train.open())
        assert len(carried) == beside
        seen += [group.drawn for group in trained]
        assert sorted([*seen, *(group.drawn for group in carried)]) == list(range((iteration + 1) * prompts + beside))
        for sample in read_samples(before):
            assert sample.weight_versions == sorted(sample.weight_versions)
            assert iteration - min(sample.weight_versions) <= bound
        for group in trained:
            assert [group.length(member) for member in range(responses)] == [
                rollouts.length(group.drawn, member) for member in range(responses)
            ]
            for one in group.begun:
                assert one.response.response_ids == list(range(len(one.response.response_ids)))
        # Under the prompts of an iteration that nothing was carried into.
        rows = [prompt.row for prompt in run.train.open().read_on(0, len(seen) + beside, run.seed("data"))]
        assert all(group.prompt.row == rows[group.drawn] for group in [*trained, *carried])
    assert Counter(seed for seed, _ in rollouts.requests).most_common(1)[0][1] == 1


def three_rollouts(run: Run) -> tuple[Rollouts, list[Artifact]]:
    """One prompt is trained on at a time and one carried; responses of 4 tokens grow by 3, under two versions."""
    rollouts = Rollouts(
        partial(
            run,
            prompts=1,
            responses=2,
            max_response_tokens=8,
            partial_response_tokens=3,
            oversampled_prompts=1,
        ),
        [[2, 2], [8, 5]],
    )
    artifacts: list[Artifact] = []
    for iteration in range(3):
        artifacts.append(rollouts.next(iteration, artifacts[-1] if artifacts else None)[1])
    return rollouts, artifacts


def test_each_token_keeps_the_log_prob_the_version_and_the_route_of_when_it_was_sampled(run):
    _, artifacts = three_rollouts(run)
    first, second, third = (list(read_samples(artifact)) for artifact in artifacts)
    assert [sample.weight_versions for sample in first] == [[0, 0]] * 2
    # The third prompt, as short as the first, overtakes the second.
    assert [sample.weight_versions for sample in second] == [[1, 1]] * 2
    assert [sample.weight_versions for sample in third] == [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1]]
    long, short = third
    assert long.log_probs == [-version - token / 64 for token, version in enumerate(long.weight_versions or [])]
    # Tokens 3 and 6 of the response were first fed when what follows them was sampled, under the next weights.
    fed_under = [0, 0, *[0, 0, 0], *[1, 1, 1], *[2, 2]]
    assert long.trace.ids_TLK[:-1, 0, 0].tolist() == [route(version, row) for row, version in enumerate(fed_under)]
    assert short.trace.ids_TLK[:-1, 1, 0].tolist() == [route(v, row) for row, v in enumerate([0, 0, 0, 0, 0, 1, 1])]
    assert staleness_metrics(third, 2, 2) == {
        "rollout/staleness_mean": pytest.approx((6 + 3 + 6 + 2) / 13),
        "rollout/staleness_max": 2.0,
        "rollout/carried_tokens": pytest.approx(11 / 13),
    }
    assert staleness_metrics(second, 1, 1)["rollout/staleness_max"] == 0.0
    # One step off, trained on an iteration later; its own tokens are not those that were carried.
    assert staleness_metrics(third, 3, 2) == {
        "rollout/staleness_mean": pytest.approx((6 + 3 + 6 + 2) / 13 + 1),
        "rollout/staleness_max": 3.0,
        "rollout/carried_tokens": pytest.approx(11 / 13),
    }


def test_a_policy_is_of_the_weight_version_that_trains_it(run):
    trained = ArtifactRef(uri="iterations/00004/training", sha256="a" * 64)
    assert [run.weight_version(policy) for policy in (run.initial_policy, trained)] == [0, 5]
    there = ArtifactRef(uri="file:///runs/other/iterations/00002/training", sha256="b" * 64)
    fork = ForkPoint(
        root="file:///runs",
        run_id="other",
        iteration=3,
        model_sha256=run.model_sha256,
        policy=there,
        predictor=None,
        trainings=(),
        lineage=("other",),
    )
    forked = run.model_copy(update={"forked_from": fork})
    assert [forked.weight_version(policy) for policy in (there, trained)] == [3, 5]


def test_the_archive_says_of_each_row_under_which_weights_it_was_routed(run):
    rollouts, artifacts = three_rollouts(run)
    archive = RouteArchive.open(rollouts.run.open(archive_routes(rollouts.run, 2, artifacts[2].ref)))
    versions = {origin_of(version): version for version in range(3)}
    rows = [
        versions[origin]
        for tokens in archive.sequence_tokens(0, 2)
        for part, origin in archive.origins_of(tokens)
        for _ in range(part.start, part.stop)
    ]
    assert rows == [*(0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2), *(0, 0, 0, 0, 0, 1, 1, 1)]
    assert route_changes(3, [4, 4, 5, 5, 7]) == [(0, 4), (4, 5), (6, 7)]
    assert route_changes(1, []) == []


def test_what_is_carried_of_other_data_or_altered_is_refused(run, tmp_path):
    rollouts, artifacts = three_rollouts(run)
    elsewhere = rollouts.run.model_copy(update={"train": run.benchmarks["addition"]})
    with pytest.raises(ConfigError, match="carries responses to prompts of a file with sha256"):
        begin_rollout(elsewhere, 2, artifacts[1])
    local = rollouts.run.model_copy(update={"root": str(tmp_path / "copy")})
    _, artifact = Rollouts(local, [[8, 8]]).next(0, None)
    part = next((tmp_path / "copy").rglob("carried-00000.parquet"))
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(ArchiveCorrupt, match=r"carried-00000\.parquet was altered"):
        begin_rollout(local, 1, artifact)


def test_each_object_of_the_rollout_before_is_read_once(run, monkeypatch):
    rollouts, artifacts = three_rollouts(run)
    read, reading = [], Artifact.read_bytes
    monkeypatch.setattr(Artifact, "read_bytes", lambda *args: (read.append(args[1]), reading(*args))[1])
    rollouts.next(3, artifacts[2])
    assert sorted(read) == ["carried-00000.parquet", "partial.json"]


def test_a_response_does_not_go_on_after_another_prompt_or_in_another_model(run):
    _, artifacts = three_rollouts(run)
    [group] = read_carried(artifacts[1], run.train.open())
    going = group.unfinished[0]
    begun = range(group.length(going))
    with pytest.raises(RoutingMismatch, match=r"a prompt of 3 tokens went on after one of 2 others"):
        group.take(going, stretch(begun, 3, 8, 2, prompt=[7, 8]), 2, 8)
    new = stretch(begun, 3, 8, 2)
    wider = RoutingTrace(new.trace.ids_TLK, new.trace.valid_T, EXPERTS + 1, LAYERS)
    with pytest.raises(RoutingMismatch, match="another model"):
        group.take(going, Response(**{**vars(new), "trace": wider}), 2, 8)


def test_a_rollout_goes_on_with_the_one_before_and_no_other(run):
    rollouts, artifacts = three_rollouts(run)
    run = rollouts.run
    assert run.carried(None, 0) is None
    found = run.carried(artifacts[0].ref, 1)
    assert found is not None
    assert found.ref == artifacts[0].ref
    for ref, iteration in ((None, 1), (artifacts[0].ref, 2), (artifacts[1].ref, 1)):
        with pytest.raises(ConfigError, match=f"iteration {iteration} .* prompts would be lost"):
            run.carried(ref, iteration)


def test_cleaning_leaves_the_rollout_that_the_next_one_goes_on_with(run, tmp_path):
    rollouts = Rollouts(partial(run, prompts=1, responses=2, partial_response_tokens=3, oversampled_prompts=1), [[5]])
    rollouts.run = rollouts.run.model_copy(update={"root": str(tmp_path / "kept")})
    before = None
    for iteration in range(2):
        _, before = rollouts.next(iteration, before)
        rollouts.run.store().begin("training", iteration, {}, "digest").commit()
    store = rollouts.run.store()
    store.create_run({"run_id": "partial"})
    found = find_removable(store, Retention(older_than=timedelta(0), keep_iterations=1), timedelta(0))
    assert [one.name for one in found.removable] == ["partial/iterations/00000/rollout"]


def test_a_rollout_that_is_not_partial_stores_nothing_of_it(run):
    store = RunStore(f"memory://{uuid.uuid4().hex}", "run")
    writer = store.begin("rollout", 0, {}, "digest")
    response = stretch([], 8, 8, 0)
    [prompt] = run.train.open().at([3])
    write_samples(writer, [make_sample(0, 0, prompt, response)])
    artifact = store.open(writer.commit(attributes=origin_of(0).model_dump(mode="json")))
    assert [stored.path for stored in artifact.commit.objects] == ["captured-00000.parquet", "part-00000.parquet"]
    assert read_about(artifact) is None
    assert [sample.weight_versions for sample in read_samples(artifact)] == [None]


@pytest.mark.parametrize("given", [{"partial_response_tokens": 3}, {"oversampled_prompts": 3}])
def test_partial_rollouts_need_prompts_to_spare(given):
    with pytest.raises(ConfigError, match="partial rollouts need both"):
        load_config(None, {f"rollout.{key}": value for key, value in given.items()})


def test_a_stretch_is_shorter_than_the_longest_response_but_in_a_run_that_exists(config):
    carrying = {"rollout.partial_response_tokens": 8, "rollout.oversampled_prompts": 2}
    whole = overridden(config, {**carrying, "rollout.max_response_tokens": 8})
    with pytest.raises(ConfigError, match=r"= 8 lets every .* = 8, in one round.*set it below"):
        preflight(whole, "whole")
    preflight(overridden(config, {**carrying, "rollout.max_response_tokens": 9}), "whole")
    RunStore(config.storage.root or "", "whole").create_run({"config": whole.model_dump(mode="json")})
    preflight(whole, "whole")


def test_no_prompt_is_carried_twice_at_once(config):
    carrying = {"rollout.partial_response_tokens": 2, "rollout.prompts": 4}
    told = r"oversampled_prompts = 17 .*train\.parquet\) has 16: .*set it to 16 or less .* = 4\.25 iterations older"
    with pytest.raises(ConfigError, match=told):
        preflight(overridden(config, {**carrying, "rollout.oversampled_prompts": 17}), "carries")
    with pytest.raises(ConfigError, match=r"4097 .*data\.train \(embedded\) has 4096"):
        preflight(load_config(None, {**carrying, "rollout.oversampled_prompts": 4097}), "carries")
    assert not RunStore(config.storage.root or "", "carries").exists()
    prepare(overridden(config, {**carrying, "rollout.oversampled_prompts": 16}), "carries", no_progress)


@pytest.mark.parametrize(
    ("predictors", "served"),
    [
        ({0: None, 1: "a" * 64, 2: "a" * 64}, r"2 of these .*\[0\] under none; \[1, 2\] under .* aaaaaaaaaaaa\)"),
        ({1: "a" * 64, 2: "b" * 64}, r"2 of these .*\[1\] under .* aaaaaaaaaaaa; \[2\] under .* bbbbbbbbbbbb\)"),
        ({1: None, 2: None}, None),
        ({2: "a" * 64}, None),
    ],
    ids=["begun without", "begun under another", "never predicted", "of one"],
)
def test_methods_are_told_on_tokens_of_one_predictor_alone(run, predictors, served):
    origins = {version: origin_of(version, sha256) for version, sha256 in predictors.items()}
    writer = run.store().begin("rollout", 2, {}, "digest")
    write_carried(writer, [], PartialAbout(prompts_drawn=1, data_sha256=run.train.sha256, origins=origins))
    is_steered = origins[2].predictor_sha256 is not None
    writer.commit(metrics={"predictor/merge_fidelity": 1.0} if is_steered else {})
    run.store().begin("routes", 2, {}, "digest").commit()
    r2, r3, pr2 = (load_config(None, {"method": name}).method for name in ("r2", "r3", "pr2"))

    assert require_replayable(run.store(), 2, [r2]).commit.stage == "rollout"
    if served is None:
        assert tellable_methods(run.store(), 2) == (["r2", "pr2"] if is_steered else ["r2", "r3"])
        require_replayable(run.store(), 2, [pr2 if is_steered else r3])
        return
    assert tellable_methods(run.store(), 2) == ["r2"]
    for method in (r3, pr2):
        with pytest.raises(ConfigError, match=served):
            require_replayable(run.store(), 2, [method])
