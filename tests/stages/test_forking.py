"""Forking a run: what the new one starts from, what it may change, what is refused."""

import json
import shutil
from datetime import timedelta

import pytest

from moe_replay.archive.artifacts import RunStore
from moe_replay.archive.cleaning import searches
from moe_replay.archive.dependents import needed_by_forks
from moe_replay.archive.removal import Findings, remove
from moe_replay.archive.retention import Retention, find_removable
from moe_replay.archive.superseding import made_from, supersede
from moe_replay.cli.app import app
from moe_replay.config_reading import overridden
from moe_replay.engines.process import no_progress
from moe_replay.errors import ArchiveCorrupt, ConfigError
from moe_replay.forking import fork_run, forked_config, left_behind
from moe_replay.methods import Method
from moe_replay.plan import ForkPoint, RunPlan
from moe_replay.preparation import prepare
from moe_replay.stages.run import Run


@pytest.fixture
def source(config) -> Run:
    """A run of five iterations, three of which are trained."""
    run = prepare(config, "source", no_progress)
    for iteration in range(3):
        for stage in ("rollout", "training"):
            writer = run.store().begin(stage, iteration, {}, run.digest(stage))
            writer.write_bytes("checkpoint/huggingface/model", f"{stage} {iteration}".encode())
            writer.commit()
    return run


def fork(source: Run, iteration: int, run_id: str = "branch", **overrides) -> Run:
    config = overridden(source.config, {key.replace("__", "."): value for key, value in overrides.items()})
    return fork_run(source.store(), source.root, iteration, config, run_id, no_progress)


def keep_last(run: Run) -> None:
    for removable in find_removable(run.store(), Retention(keep_last_checkpoint=True), timedelta(0)).removable:
        remove(run.root, removable)


def test_a_fork_starts_from_the_training_before_and_copies_nothing(source):
    branch = fork(source, 2)
    assert list(branch.plan.iterations) == [2, 3, 4]
    assert branch.forked_from is not None
    policy = branch.forked_from.policy
    assert branch.open(policy).read_bytes("checkpoint/huggingface/model") == b"training 1"
    assert policy.sha256 == source.store().commit_of("training", 1).sha256
    with branch.policy(policy, with_optimizer=False) as held:
        assert (held.model_folder / "model").read_bytes() == b"training 1"
    assert [path for path in branch.store().folder.files()] == ["run.json"]


def test_a_fork_that_is_opened_again_is_the_same(source):
    branch = fork(source, 2)
    assert prepare(branch.config, "branch", no_progress) == branch
    stored = RunPlan.stored(branch.store())
    assert (stored.forked_from, list(stored.iterations)) == (branch.forked_from, [2, 3, 4])
    assert ForkPoint.stored(source.store()) is None


def test_everything_but_the_model_may_change(source, config, tmp_path):
    branch = fork(source, 1, method="grpo", training__learning_rate=1e-6, seed=7, iterations=9)
    assert (branch.config.method.name, branch.config.seed, branch.config.iterations) == ("grpo", 7, 9)
    # The same model elsewhere is the same model.
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    assert fork(source, 1, "moved", model__path=str(tmp_path / "moved")).model == tmp_path / "moved"
    (tmp_path / "moved/model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match=r"its checkpoints are of that model"):
        fork(source, 1, "other", model__path=str(tmp_path / "moved"))
    assert not RunStore(source.root, "other").exists()


def test_the_engine_that_trains_stays_with_its_optimizer_state(source):
    with pytest.raises(ConfigError, match=r"'fsdp2' in run .*'megatron'.*--set model\.path=\.\.\./checkpoint/hugg"):
        fork(source, 2, training__engine="megatron", training__packing=True)
    assert not RunStore(source.root, "branch").exists()


def test_what_is_trained_adapters_or_all_weights_stays(config):
    adapted = prepare(overridden(config, {"training.lora.rank": 8}), "adapted", no_progress)
    adapted.store().begin("training", 0, {}, adapted.digest("training")).commit()
    changes = [
        ({"training__lora__rank": 4}, r"changes training\.lora\.rank \(8 -> 4\) of run adapted"),
        ({"training__lora__alpha": 64}, r"training\.lora\.alpha \(32 -> 64\)"),
        ({"training__lora__train_routers": True}, r"training\.lora\.train_routers \(False -> True\)"),
        ({"training__lora__rank": 0}, r"\(8 -> 0\).*--set model\.path=\.\.\./checkpoint/huggingface"),
    ]
    for change, told in changes:
        with pytest.raises(ConfigError, match=told):
            fork(adapted, 1, **change)
    assert fork(adapted, 1, training__learning_rate=1e-3).config.training.lora.rank == 8


@pytest.mark.parametrize(
    "off", [{"training.lora.rank": 0}, {"training.lora.rank": "none"}, {"training.lora": "none"}], ids=str
)
def test_to_switch_adapters_off_is_refused_because_the_source_trains_them(config, off):
    ours = {"training.lora.rank": 8, "training.lora.alpha": 16, "training.lora.targets": ["q_proj"]}
    source = prepare(overridden(config, ours), "adapted", no_progress)
    told = r"a fork trains on what its source trained.*training\.lora\.rank \(8 -> 0\) of run adapted"
    with pytest.raises(ConfigError, match=told):
        forked_config(source.store(), off)
    assert forked_config(source.store(), {"seed": 3}).training.lora == source.config.training.lora


def test_adapters_are_no_way_to_go_on_from_weights(source):
    with pytest.raises(ConfigError, match=r"training\.lora\.rank \(0 -> 8\) of run source"):
        fork(source, 1, training__lora__rank=8)


def test_a_fork_lies_where_it_is_told_to(source, tmp_path):
    branch = fork(source, 1, storage__root=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/branch/run.json").is_file()
    assert branch.forked_from.root == source.root
    branch.require_origin()


@pytest.mark.parametrize(
    ("iteration", "change", "told"),
    [
        (0, {}, "starts from the model itself"),
        (
            4,
            {},
            "has no training of iteration 3 for iteration 4 to start from; it has those of 0 to 2",
        ),
        (3, {"iterations": 3}, "leaves nothing to do from iteration 3 on; give at least --set iterations=4"),
    ],
)
def test_an_iteration_that_nothing_leads_to_is_refused(source, iteration, change, told):
    with pytest.raises(ConfigError) as caught:
        fork(source, iteration, **change)
    assert told in str(caught.value)
    assert not RunStore(source.root, "branch").exists()


def test_a_name_that_is_taken_is_refused(source):
    with pytest.raises(ConfigError, match="run source exists; fork under a name that is free"):
        fork(source, 1, "source")


def test_a_run_that_trained_nothing_is_refused(config):
    with pytest.raises(ConfigError, match="it has none: resume it first"):
        fork(prepare(config, "new", no_progress), 1)


def test_what_retention_removed_can_be_no_start(source):
    keep_last(source)
    with pytest.raises(ConfigError, match=r"removed by retention on .*not the last checkpoint.*take a later iteration"):
        fork(source, 2)
    assert fork(source, 3).forked_from is not None


def test_a_fork_whose_source_loses_what_it_starts_from_says_so(source):
    branch = fork(source, 2)
    keep_last(source)
    with pytest.raises(ConfigError, match=r"forked from iteration 2 of run source .*lost objects to retention"):
        prepare(branch.config, "branch", no_progress)
    shutil.rmtree(source.store().folder.local_folder)
    with pytest.raises(ConfigError, match=r"forked from iteration 2 of run source .*_committed\.json is missing"):
        prepare(branch.config, "branch", no_progress)


def test_a_fork_that_has_trained_needs_its_source_no_more(source):
    branch = fork(source, 2)
    branch.store().begin("training", 2, {"policy": branch.forked_from.policy}, "d").commit()
    assert branch.store().lost_inputs(branch.store().committed("training", 2)) == []
    shutil.rmtree(source.store().folder.local_folder)
    prepare(branch.config, "branch", no_progress)
    # Which verify tells nevertheless.
    [lost] = branch.store().lost_inputs(branch.store().committed("training", 2))
    assert "was made from its policy, but" in lost


def test_a_fork_one_step_off_needs_the_policy_until_its_second_batch_is_sampled(source):
    branch = fork(source, 2, rollout__one_step_off=True)
    policy = branch.forked_from.policy
    branch.store().begin("training", 2, {"policy": policy}, "d").commit()
    assert needed_by_forks(source.root)[policy.sha256] == "branch"
    document = branch.store().read_run()
    branch.store().rewrite_run({**document, "config": document["config"] | {"iterations": 3}})
    assert policy.sha256 not in needed_by_forks(source.root)
    branch.store().rewrite_run(document)
    source.store().folder.local_folder.rename(source.store().folder.local_folder.with_name("away"))
    with pytest.raises(ConfigError, match=r"forked from iteration 2 of run source .*_committed\.json is missing"):
        prepare(branch.config, "branch", no_progress)
    branch.store().begin("rollout", 3, {"policy": policy}, "d").commit()
    assert policy.sha256 not in needed_by_forks(source.root)
    prepare(branch.config, "branch", no_progress)


def test_a_fork_goes_on_from_what_its_source_took_back(source):
    branch = fork(source, 2)
    supersede(source.store(), made_from(source.store(), "training", 1))
    again = prepare(branch.config, "branch", no_progress)
    assert again.open(branch.forked_from.policy).ref.sha256 == branch.forked_from.policy.sha256
    with again.policy(branch.forked_from.policy, with_optimizer=True) as policy:
        assert [path for path in policy.folder.rglob("*") if path.is_file()]


def test_a_fork_of_a_fork_goes_back_no_further_than_its_own(source):
    branch = fork(source, 2)
    branch.store().begin("training", 2, {}, "d").commit()
    with pytest.raises(ConfigError, match=r"was forked itself, from run source at iteration 2.*fork that one"):
        fork(branch, 2, "twig")
    twig = fork(branch, 3, "twig")
    assert twig.forked_from.lineage == ("branch", "source")


def test_an_unreadable_origin_is_told(source):
    branch = fork(source, 2)
    document = branch.store().read_run()
    branch.store().rewrite_run({**document, "forked_from": {**document["forked_from"], "iteration": 0}})
    with pytest.raises(ArchiveCorrupt, match="nothing readable of what the run was forked from"):
        RunPlan.stored(branch.store())


def test_a_fork_goes_on_with_what_the_rollout_before_left_if_it_samples_as_the_source_does(config):
    settings = {"rollout.partial_response_tokens": 2, "rollout.oversampled_prompts": 3}
    source = prepare(overridden(config, settings), "source", no_progress)
    for stage in ("rollout", "training"):
        writer = source.store().begin(stage, 0, {}, source.digest(stage))
        writer.write_bytes("data", b"data")
        writer.commit()
    branch = fork(source, 1, method="grpo", training__learning_rate=1e-6)
    left = source.store().commit_of("rollout", 0)
    point = branch.forked_from
    assert point is not None
    assert point.carried is not None
    assert branch.carried(point.carried, 1).ref.sha256 == left.sha256
    assert prepare(branch.config, "branch", no_progress) == branch
    assert needed_by_forks(source.root)[left.sha256] == "branch"
    assert left_behind(source.store(), branch.config) is None
    for changed in ({"rollout__temperature": 0.5}, {"seed": 3}, {"rollout__oversampled_prompts": 4}):
        other = fork(source, 1, f"other-{'-'.join(changed)}", **changed)
        assert other.forked_from.carried is None
        assert other.carried(None, 1) is None
        assert left_behind(source.store(), other.config) == (3, tuple(key.replace("__", ".") for key in changed))
    assert fork(source, 1, "beside", rollout__one_step_off=True).forked_from.carried == point.carried
    with pytest.raises(ConfigError, match="goes on with what the rollout before left unfinished, got none"):
        branch.carried(None, 1)
    shutil.rmtree(source.store().folder.local_folder / "iterations/00000/rollout")
    with pytest.raises(ConfigError, match=r"forked from iteration 1 of run source .*_committed\.json is missing"):
        prepare(branch.config, "branch", no_progress)


def test_the_command_takes_a_method_as_run_does_and_settings_over_it(source, capsys):
    def forked(name: str, *words: str) -> Method:
        words = ("fork", "source", "--iteration=1", f"--as={name}", f"--root={source.root}", *words)
        app(words, exit_on_error=False, result_action="return_value")
        return RunPlan.stored(RunStore(source.root, name)).config.method

    assert forked("same") == source.config.method
    assert forked("other", "--method", "gspo") == Method.model_validate("gspo")
    assert forked("over", "--method", "gspo", "--set", "method.clip_low=0.1").label == "gspo+clip_low=0.1"
    assert forked("set", "--method", "gspo", "--set", "method=tis").name == "tis"
    with pytest.raises(ConfigError, match="unknown method 'ppo'"):
        forked("unknown", "--method", "ppo")


def test_the_command_says_how_many_prompts_a_fork_leaves_behind_and_why(config, capsys):
    settings = {"rollout.partial_response_tokens": 2, "rollout.oversampled_prompts": 3}
    source = prepare(overridden(config, settings), "source", no_progress)
    for stage in ("rollout", "training"):
        source.store().begin(stage, 0, {}, source.digest(stage)).commit()

    def told(name: str, *words: str) -> str:
        words = ("fork", "source", "--iteration=1", f"--as={name}", f"--root={source.root}", *words)
        app(words, exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    assert "left behind" not in told("same")
    assert json.loads(told("same-json", "--json"))["prompts_left_behind"] == 0
    off = ("--set=rollout.partial_response_tokens=none", "--set=rollout.oversampled_prompts=0", "--set=seed=1")
    assert told("off", *off).startswith(
        "left behind: 3 prompts that the rollout of iteration 0 carried, with what was sampled of their responses, "
        "because seed, rollout.partial_response_tokens, rollout.oversampled_prompts changed\n"
    )
    assert json.loads(told("json", "--set=seed=1", "--json"))["prompts_left_behind"] == 3


def test_carried_work_that_retention_took_can_be_left_behind(config):
    settings = {"rollout.partial_response_tokens": 2, "rollout.oversampled_prompts": 3}
    source = prepare(overridden(config, settings), "source", no_progress)
    for iteration in range(3):
        for stage in ("rollout", "training"):
            writer = source.store().begin(stage, iteration, {}, source.digest(stage))
            writer.write_bytes("part-00000.parquet", b"data")
            writer.commit()
    for removable in find_removable(source.store(), Retention(keep_iterations=1), timedelta(0)).removable:
        if removable.name.endswith("00000/rollout"):
            remove(source.root, removable)
    with pytest.raises(ConfigError, match=r"unfinished responses.*--set rollout\.oversampled_prompts=2"):
        fork(source, 1)
    assert fork(source, 1, rollout__oversampled_prompts=2).forked_from.carried is None


def test_gc_leaves_alone_what_a_fork_starts_from_until_it_has_trained(source):
    branch = fork(source, 2)
    found = cleaned(source)
    assert [one.name for one in found.removable] == ["source/iterations/00000/training/checkpoint"]
    told = "source/iterations/00001/training: run branch, which was forked from it, still needs it"
    assert found.left_alone == [told]

    writer = branch.store().begin("training", 2, {}, branch.digest("training"))
    writer.write_bytes("checkpoint/huggingface/model", b"training 2")
    writer.commit()
    found = cleaned(source)
    assert [one.name for one in found.removable] == [f"source/iterations/0000{n}/training/checkpoint" for n in (0, 1)]
    assert found.left_alone == []


def cleaned(run: Run) -> Findings:
    return searches(run.root, [run.run_id], Retention(keep_last_checkpoint=True), timedelta(0))[run.run_id]()
