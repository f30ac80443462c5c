"""What it costs vLLM to return routes: tokens a second of two engines that differ in `enable_return_routed_experts`.

    OMP_NUM_THREADS=1 python benchmarks/capture_cost.py [--rounds 10] [--prompts 32] [--tokens 64]

On the embedded model and on a random Qwen3-MoE of 200 M parameters (8 layers, 64 experts, top-8, H = 512), both in
bfloat16. Each engine has a process of its own and the settings of a run (`moe_replay.engines.rollout`); both sample the
same prompts under the same seeds and have to give the same tokens. Seconds are the processor's on a CPU, which other
processes hardly touch (so give it one thread), and the clock's elsewhere. They take turns, the first of a round in turn
too, and a round before the first warms up. Told is the ratio of tokens a second with routes to those without, by round:
median, and quartiles in brackets; once of vLLM alone, and once with what moe-replay does next, which is to check the
routes and turn them into traces.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_replay import tiny
from moe_replay.engines import rollout
from moe_replay.engines.process import EngineProcess, no_progress
from moe_replay.places import home_folder
from moe_replay.routing.trace import RoutingTrace, refuse_dead_capture
from moe_replay.sections import RolloutConfig

LARGER = tiny.ModelShape(
    layers=8, hidden=512, expert_width=256, experts=64, top_k=8, heads=8, kv_heads=2, head_dim=64, init_std=0.05
)
PROMPT_TOKENS = 64


class Sampled(NamedTuple):
    """What one engine made of the prompts."""

    token_ids: list[list[int]]
    seconds: float
    """In vLLM."""
    seconds_with_traces: float


class Sampler(rollout.RolloutEngine):
    """A rollout engine that may be without routes."""

    def __init__(self, model: Path, config: RolloutConfig, with_routes: bool):
        import vllm

        made = vllm.LLM
        vllm.LLM = lambda **settings: made(**{**settings, "enable_return_routed_experts": with_routes})
        try:
            super().__init__(model, "measured", config)
        finally:
            vllm.LLM = made


def sample(engine: Sampler, _: object, prompts: list[list[int]], tokens: int) -> Sampled:
    """One response of `tokens` tokens to each prompt."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    clock = time.process_time if current_platform.is_cpu() else time.perf_counter
    sampling = [
        SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, seed=seed)
        for seed in range(len(prompts))
    ]
    given: Any = [{"prompt_token_ids": ids} for ids in prompts]
    engine._llm.reset_prefix_cache()
    start = clock()
    outputs = engine._llm.generate(given, sampling, use_tqdm=False)
    seconds = clock() - start
    if outputs[0].outputs[0].routed_experts is not None:
        refuse_dead_capture([trace_of(engine, output) for output in outputs])
    return Sampled([list(one.outputs[0].token_ids) for one in outputs], seconds, clock() - start)


def trace_of(engine: Sampler, output: Any) -> RoutingTrace:
    """As the rollout engine makes it."""
    captured, layers = np.asarray(output.outputs[0].routed_experts), engine.layers
    tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    return RoutingTrace.from_capture(captured[:, list(layers)], tokens, engine.num_experts, layers)


def main() -> None:
    """Print tokens a second and ratios by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    home = home_folder()
    home.mkdir(parents=True, exist_ok=True)
    print(f"{asked.prompts} prompts of {PROMPT_TOKENS} tokens, {asked.tokens} sampled for each; ratios by round")
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "embedded": tiny.prepare(home, no_progress).model,
            "random, 200 M parameters": write_larger(Path(folder) / "larger"),
        }
        for name, model in models.items():
            measure(name, model, asked.rounds, draw_prompts(asked.prompts), asked.tokens, Path(folder))
    print(f"load of the machine (1 minute) {os.getloadavg()[0]:.1f} after; {os.cpu_count()} cores")


def write_larger(folder: Path) -> Path:
    """A random model with the embedded one's tokenizer."""
    import torch

    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(LARGER, tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def draw_prompts(number: int) -> list[list[int]]:
    """Random characters."""
    return np.random.default_rng(0).integers(3, len(tiny.CHARACTERS), (number, PROMPT_TOKENS)).tolist()


def measure(name: str, model: Path, rounds: int, prompts: list[list[int]], tokens: int, logs: Path) -> None:
    """Print what one model does with routes and without."""
    config = RolloutConfig(dtype="bfloat16", max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=tokens)
    engines = {
        kind: EngineProcess(
            "capture_cost:Sampler", (model, config, kind == "on"), kind, logs / f"{kind}.log", rollout.ENVIRONMENT
        )
        for kind in ("on", "off")
    }
    found: dict[str, list[Sampled]] = {kind: [] for kind in engines}
    try:
        for number in range(rounds + 1):
            for kind in ("on", "off") if number % 2 else ("off", "on"):
                made = engines[kind].call("capture_cost:sample", no_progress, prompts, tokens)
                if number:  # the first round warms up
                    found[kind].append(made)
    finally:
        for engine in engines.values():
            engine.stop()
    report(name, found, len(prompts) * tokens)


def report(name: str, found: dict[str, list[Sampled]], tokens: int) -> None:
    """Print tokens a second, their ratio, and whether the tokens are the same."""
    on, off = ([one.seconds for one in found[kind]] for kind in ("on", "off"))
    whole = [one.seconds_with_traces for one in found["on"]]
    same = all(one.token_ids == found["off"][0].token_ids for made in found.values() for one in made)
    print(f"\n{name}: the tokens are {'the same' if same else 'NOT the same'}")
    print(f"tokens a second, routes off     {shown(tokens / np.array(off), 0)}")
    print(f"tokens a second, routes on      {shown(tokens / np.array(on), 0)}")
    print(f"on / off, vLLM alone            {shown(np.array(off) / np.array(on), 3)}")
    print(f"on / off, with traces           {shown(np.array(off) / np.array(whole), 3)}", flush=True)


def shown(values: np.ndarray, digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
