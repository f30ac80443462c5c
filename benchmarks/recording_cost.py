"""What replay, coverage gaps and router features cost a training step: forward and backward of a stack of MoE layers.

    OMP_NUM_THREADS=1 python benchmarks/recording_cost.py [--tokens 4096] [--rounds 15] [--device cpu]

A random Qwen3-MoE of 8 layers, 64 experts, top-8, H = 256, in float32, on sequences of 512 tokens. The ways to run take
turns, in an order that rotates, so that a slow spell of the machine falls on all; what is told is the ratio to the
model without moe-replay in the same round: the median over rounds and, after it, half the distance between the
quartiles. Seconds are the processor's on a CPU, which other processes hardly touch, and the clock's elsewhere. The
routes replayed are the model's own, so that the experts' load is the same. `prediction` is a forward and backward under
predicted gates, which a run does without a backward.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_replay.routing.routers import Routers

LAYERS, EXPERTS, TOP_K, HIDDEN, SEQUENCE, VOCABULARY = 8, 64, 8, 256, 512, 512
WATCHED = 512


def main() -> None:
    """Print seconds and ratios by way to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = build().to(asked.device)
    tokens_BS = torch.randint(VOCABULARY, (asked.tokens // SEQUENCE, SEQUENCE), device=asked.device)
    routers: list[Routers] = []
    ways = ways_to_run(model, routers, own_routes(model, tokens_BS))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(asked.rounds + 1):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            while routers:
                routers.pop().remove()
            ways[name]()
            taken = step(model, tokens_BS)
            if number:  # the first round warms up
                seconds[name].append(taken)
    report(seconds)


def build() -> torch.nn.Module:
    """The model, with weights large enough that routes differ."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        initializer_range=0.08,
    )
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").train()


def own_routes(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The experts that the model chooses, [R, L, K]."""
    routers = Routers(model)
    with torch.no_grad():
        model(input_ids=tokens_BS, use_cache=False)
    routers.remove()
    return routers.live_RLK


def ways_to_run(
    model: torch.nn.Module, routers: list[Routers], ids_RLK: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """What to do before a step, by name; routers that it hooks are added to `routers`."""
    rows, device = len(ids_RLK), ids_RLK.device
    present_R = torch.ones(rows, dtype=torch.bool, device=device)
    rows_S = torch.randperm(rows, device=device)[:WATCHED].sort().values
    predictor = {layer: 1e-3 * torch.randn(EXPERTS, HIDDEN, device=device) for layer in range(LAYERS)}

    def hooked(*calls: Callable[[Routers], None]) -> Callable[[], None]:
        def prepare() -> None:
            routers.append(Routers(model))
            for call in calls:
                call(routers[-1])

        return prepare

    def replay(one: Routers) -> None:
        one.replay(ids_RLK, present_R)

    def watch(one: Routers) -> None:
        one.watch(rows_S)

    return {
        "without moe-replay": lambda: None,
        "off": hooked(),
        "replay": hooked(replay),
        "replay + coverage": hooked(replay, Routers.compare),
        f"replay + recording {WATCHED} rows": hooked(replay, watch),
        "replay + both": hooked(replay, Routers.compare, watch),
        "prediction": hooked(lambda one: one.predict(predictor, present_R)),
    }


def step(model: torch.nn.Module, tokens_BS: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    _wait(tokens_BS)
    clock = time.perf_counter if tokens_BS.is_cuda else time.process_time
    start = clock()
    model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
    _wait(tokens_BS)
    return clock() - start


def report(seconds: dict[str, list[float]]) -> None:
    """Print one line a way."""
    base = np.array(seconds["without moe-replay"])
    print(f"{'':28} {'median s':>9} {'min s':>8} {'ratio':>7}")
    for name, taken in seconds.items():
        low, middle, high = np.percentile(np.array(taken) / base, [25, 50, 75])
        times = f"{np.median(taken):9.3f} {min(taken):8.3f}"
        print(f"{name:28} {times} {middle:7.3f} ± {(high - low) / 2:.3f}")


def _wait(like: torch.Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
