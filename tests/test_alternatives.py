"""The comparison with alternatives (`benchmarks/alternatives.py`): its sums, and what others are told to compute."""

import json
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from moe_replay.config_reading import load_config
from moe_replay.errors import ConfigError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def alternatives(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import alternatives

    return alternatives


def test_time_inside_a_watched_function_is_counted_once(alternatives):
    clocks = alternatives.clocks
    inner = clocks.timed(lambda: time.sleep(0.05), "inner")
    outer = clocks.timed(lambda: (inner(), time.sleep(0.02)), "outer")
    clocks.take(None, None)
    start = time.perf_counter()
    outer()
    whole = time.perf_counter() - start
    spans = clocks.take(None, None)
    assert [label for label, _, _ in spans] == ["inner", "outer"]
    seconds = clocks.between(spans, 0.0, time.time())
    assert seconds["inner"] >= 0.05
    assert 0.02 <= seconds["outer"] < 0.05
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.01)
    assert clocks.take(None, None) == []


def test_threads_are_watched_where_that_is_asked_for_each_by_itself(alternatives):
    clocks = alternatives.clocks
    silent, heard = clocks.timed(lambda: None, "silent"), clocks.timed(lambda: None, "heard", in_threads=True)
    clocks.take(None, None)

    def outer() -> None:
        threads = [threading.Thread(target=one) for one in (silent, heard)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    clocks.timed(outer, "outer")()
    spans = {label: seconds for label, _, seconds in clocks.take(None, None)}
    assert spans.keys() == {"heard", "outer"}
    assert spans["outer"] > spans["heard"]


def test_a_function_timed_whole_keeps_what_is_watched_within_it(alternatives):
    clocks = alternatives.clocks
    inner = clocks.timed(lambda: time.sleep(0.05), "inner")
    whole = clocks.timed(inner, "whole", whole=True)
    clocks.take(None, None)
    clocks.timed(whole, "outer")()
    spans = {label: seconds for label, _, seconds in clocks.take(None, None)}
    assert spans.keys() == {"whole", "outer"}
    assert spans["whole"] >= 0.05 > spans["outer"]


def test_methods_of_all_kinds_are_watched(alternatives, monkeypatch):
    module = ModuleType("to_be_watched")

    class Thing:
        def method(self):
            return self

        @classmethod
        def made(cls):
            return cls()

    module.Thing = Thing
    module.function = lambda: 3
    monkeypatch.setitem(sys.modules, "to_be_watched", module)
    names = ["to_be_watched:Thing.method", "to_be_watched:Thing.made", "to_be_watched:function"]
    alternatives.clocks.watch(None, None, {name: name for name in names})
    thing = Thing.made()
    assert thing.method() is thing
    assert module.function() == 3
    assert [label for label, _, _ in alternatives.clocks.take(None, None)] == [names[1], names[0], names[2]]


def test_the_parts_of_an_iteration_add_up_and_the_first_is_left_out(alternatives):
    here = [("call", 9.0, 5.0), ("call", 11.0, 0.5), ("call", 13.0, 0.75), (alternatives.MLFLOW, 13.5, 0.25)]
    engines = [("sampling", 8.0, 4.0), ("sampling", 10.9, 0.25), ("optimizer steps", 12.9, 0.5)]
    found = alternatives.measured_of([10.0, 12.0, 14.0], here, engines, [7, 8, 9], [0.1, 0.2, 0.3])
    assert found.seconds == [2.0, 2.0]
    assert (found.tokens, found.rewards) == ([8, 9], [0.2, 0.3])
    assert found.parts == {
        alternatives.STAGES: 0.25,
        alternatives.MLFLOW: 0.125,
        "sampling": 0.125,
        "optimizer steps": 0.25,
        alternatives.REST: 1.375,  # MLflow is told while a rollout is at work
    }


def test_the_table_tells_ratios_by_round(alternatives):
    def run(seconds):
        return alternatives.Measured([seconds] * 3, {"sampling": seconds / 2}, [1280] * 3, [0.5] * 3)

    measured = {
        "bare, grpo": [run(1.0), run(4.0)],
        "moe-replay, grpo": [run(1.5), run(6.0)],
        "TRL": [run(2.0), run(8.0)],
    }
    lines = alternatives.report(measured).splitlines()
    ratios = {line.split("  ")[0]: line.split() for line in lines if " / " in line}
    assert ratios["moe-replay, grpo / bare, grpo"][-3:] == ["1.500", "[1.500,", "1.500]"]
    assert ratios["TRL / moe-replay, grpo"][-3] == "1.333"
    assert "moe-replay, r3 / bare, r3" not in ratios
    sampling = next(line for line in lines if line.startswith("sampling"))
    assert sampling.split()[1:] == ["1250", "1875", "2500"]


@pytest.mark.parametrize("mini_steps", [1, 4, 8])
def test_trl_samples_one_batch_for_every_kappa_steps(alternatives, mini_steps):
    from trl_grpo import settings_of

    config = load_config(None, {"method": "grpo", "training.mini_steps": mini_steps, "iterations": 3})
    settings = settings_of(config)
    sequences = config.rollout.prompts * config.rollout.responses
    assert settings["per_device_train_batch_size"] * settings["steps_per_generation"] == sequences
    assert settings["steps_per_generation"] * settings["num_iterations"] == mini_steps
    assert settings["max_steps"] == 3 * mini_steps
    assert (settings["epsilon"], settings["epsilon_high"]) == (0.2, 0.28)
    if find_spec("trl"):
        from trl import GRPOConfig

        assert GRPOConfig(**settings).generation_batch_size == sequences


def test_trl_is_asked_for_no_method_that_it_lacks(alternatives):
    from trl_grpo import settings_of

    with pytest.raises(ConfigError, match="method=grpo"):
        settings_of(load_config(None, {"method": "r3"}))


def test_an_interpreter_without_trl_says_so(alternatives, tmp_path):
    with alternatives.Trl(sys.executable, tmp_path / "logs" / "trl.log") as trl:
        assert (trl.version is None) == (find_spec("trl") is None)


@pytest.mark.parametrize("mini_steps", [1, 4, 8])
def test_verl_takes_the_settings_and_samples_one_batch_for_every_kappa_steps(alternatives, mini_steps):
    from hydra import compose, initialize_config_dir
    from verl_ppo import settings_of

    config = load_config(None, {"method": "grpo", "training.mini_steps": mini_steps, "iterations": 3})
    given = [f"{key}={value}" for key, value in settings_of(config, saves=True).items()]
    verl = Path(find_spec("verl").origin).parent
    with initialize_config_dir(str(verl / "trainer" / "config"), version_base=None):
        taken = compose("ppo_trainer", given)
    actor, rollout = taken.actor_rollout_ref.actor, taken.actor_rollout_ref.rollout
    assert taken.data.train_batch_size == actor.ppo_mini_batch_size * mini_steps == config.rollout.prompts
    assert rollout.n == config.rollout.responses
    assert (actor.ppo_epochs, taken.trainer.total_training_steps, taken.trainer.save_freq) == (1, 3, 1)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.28)
    assert not taken.algorithm.use_kl_in_reward
    assert not actor.use_kl_loss


@pytest.mark.parametrize(
    ("settings", "reason"), [({"method": "r3"}, "method=grpo"), ({"rollout.prompts": 6}, "no multiple")]
)
def test_verl_is_asked_for_nothing_that_it_lacks(alternatives, settings, reason):
    from verl_ppo import settings_of

    with pytest.raises(ConfigError, match=reason):
        settings_of(load_config(None, {"method": "grpo", **settings}), saves=False)


def test_an_iteration_of_verl_is_told_by_its_own_metrics(alternatives, tmp_path):
    from verl_ppo import _read

    told = {"ended": 20.0, "response_length/mean": 5.25, "critic/score/mean": 0.5, "timing_s/gen": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "data": told}) + "\n")
    assert _read(tmp_path / "metrics.jsonl", sequences=8) == {
        "ended": [20.0],
        "response_tokens": [42],
        "rewards": [0.5],
        "spans": [("sampling", 20.0, 3.0)],
    }


@pytest.mark.slow
def test_verl_finds_an_engine_a_process_group_and_vllm_on_a_cpu(alternatives, tmp_path):
    from verl_ppo import _environment

    code = """
import verl, torch
from verl.third_party.vllm import vllm_version
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine import EngineRegistry
initialize_global_process_group_ray()
print(EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__, torch.distributed.get_backend(), vllm_version)
"""
    given = _environment(tmp_path / "metrics.jsonl") | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True).stdout
    assert said.split()[-3:-1] == ["FSDPEngineWithLMHead", "gloo"]
    assert said.split()[-1][0].isdigit()
