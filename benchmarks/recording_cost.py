"""What replay, coverage gaps and router features cost a training step: forward and backward of a stack of MoE layers.

    OMP_NUM_THREADS=1 python benchmarks/recording_cost.py [--shape olmoe qwen3-30b] [--dtype bfloat16] [--device cuda]

Random Qwen3-MoE layers of growing size, by default all of `SHAPES` in turn, on sequences of 512 tokens. The ways to run
take turns, in an order that rotates, so that a slow spell of the machine falls on all; what is told is the ratio to the
model without moe-replay in the same round: the median over rounds and, after it, half the distance between the
quartiles. One way is the model without moe-replay once more: what its ratio differs from 1 by is noise. Seconds are the
processor's on a CPU, which other processes hardly touch, and the clock's elsewhere. A step is told its routes, runs
forward and backward, and hands over what was recorded, as in training; the optimizer's part, which none of this
touches, is left out. The routes replayed are the model's own, so that the experts' load is the same. `prediction` is a
forward and backward under predicted gates, which a run does without a backward. The last column is taken by the clock
in the same steps: seconds inside our own code, the median, over those of a step without moe-replay.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import clocks
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_replay.routing.routers import Routers

SEQUENCE, VOCABULARY = 512, 512
WATCHED = 512
OURS = {
    "moe_replay.routing.routers:Routers": (
        *("replay", "predict", "watch", "compare"),
        *("_begin_forward", "_choose", "_end_forward", "_of_all_layers"),
    ),
    "moe_replay.routing.observation:Observer": ("features", "coverage_gap_RL"),
    "moe_replay.routing.selection:Selection": ("enter", "leave", "_keep_logits"),
}
"""By class, what runs in a step beside the model; the few microseconds a call that its own take longer are left out."""


class Shape(NamedTuple):
    """Sizes of a model: L layers, H, I of an expert, E, K, and T tokens of a step."""

    layers: int
    hidden: int
    expert: int
    experts: int
    top_k: int
    tokens: int


SHAPES = {
    "small": Shape(8, 256, 128, 64, 8, 4096),
    "medium": Shape(2, 1024, 512, 64, 8, 2048),
    "olmoe": Shape(1, 2048, 1024, 64, 8, 1024),  # one layer of OLMoE-1B-7B
    "qwen3-30b": Shape(1, 2048, 768, 128, 8, 1024),  # one layer of Qwen3-30B-A3B
}

Way = Callable[[Routers], None]


def main() -> None:
    """Print seconds and ratios by shape and way to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    clocks.watch(None, None, {f"{owner}.{name}": "ours" for owner, own in OURS.items() for name in own})
    for name in asked.shape:
        shape = SHAPES[name]
        torch.manual_seed(0)
        model = build(shape, getattr(torch, asked.dtype), asked.device)
        tokens_BS = torch.randint(VOCABULARY, (shape.tokens // SEQUENCE, SEQUENCE), device=asked.device)
        ways = ways_to_run(shape, own_routes(model, tokens_BS))
        print(f"\n{name}: {shape}, {asked.dtype}, {asked.device}")
        report(measure(model, tokens_BS, ways, asked.rounds))
        del model


def build(shape: Shape, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model, with weights large enough that routes differ."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        moe_intermediate_size=shape.expert,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(4, shape.hidden // 64),
        num_key_value_heads=2,
        head_dim=64,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        initializer_range=0.08 * (256 / shape.hidden) ** 0.5,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="grouped_mm").train()


def own_routes(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The experts that the model chooses, [R, L, K]."""
    with hooked(model) as routers, torch.no_grad():
        model(input_ids=tokens_BS, use_cache=False)
    return routers.live_RLK


@contextmanager
def hooked(model: torch.nn.Module) -> Iterator[Routers]:
    """The model's routers, hooked within the block."""
    routers = Routers(model)
    try:
        yield routers
    finally:
        routers.remove()


def ways_to_run(shape: Shape, ids_RLK: torch.Tensor) -> dict[str, tuple[Way, ...] | None]:
    """What the routers are told before a step and asked for after it, by name; None where there are none."""
    rows, device = len(ids_RLK), ids_RLK.device
    present_R = torch.ones(rows, dtype=torch.bool, device=device)
    rows_S = torch.randperm(rows, device=device)[:WATCHED].sort().values
    predictor = {n: 1e-3 * torch.randn(shape.experts, shape.hidden, device=device) for n in range(shape.layers)}

    def replay(routers: Routers) -> None:
        routers.replay(ids_RLK, present_R)

    def watch(routers: Routers) -> None:
        routers.watch(rows_S)

    def predict(routers: Routers) -> None:
        routers.predict(predictor, present_R)

    return {
        "without moe-replay": None,
        "without, again": None,
        "off": (),
        "replay": (replay,),
        "replay + coverage": (replay, Routers.compare),
        f"replay + recording {WATCHED} rows": (replay, watch),
        "replay + both": (replay, Routers.compare, watch),
        "prediction": (predict,),
    }


def measure(
    model: torch.nn.Module, tokens_BS: torch.Tensor, ways: dict[str, tuple[Way, ...] | None], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step, and of them inside our code, by way, once a round."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            clocks.take(None, None)
            taken = run(model, tokens_BS, ways[name])
            ours = sum(seconds for _, _, seconds in clocks.take(None, None))
            if number:  # the first round warms up
                measured[name].append((taken, ours))
    return measured


def run(model: torch.nn.Module, tokens_BS: torch.Tensor, told: tuple[Way, ...] | None) -> float:
    """Seconds of one step."""
    if told is None:
        return step(model, tokens_BS, lambda: None, lambda: None)
    with hooked(model) as routers:
        return step(model, tokens_BS, lambda: [one(routers) for one in told], lambda: take(routers, told))


def take(routers: Routers, told: tuple[Way, ...]) -> None:
    """Hand over what was asked for, as the training engine does."""
    _ = routers.live_RLK
    if Routers.compare in told:
        _ = routers.coverage_gap_RL.cpu()
    if any(one.__name__ == "watch" for one in told):
        features = routers.features
        _ = features.hidden_SLH.cpu(), features.logits_SLE.cpu()


def step(
    model: torch.nn.Module, tokens_BS: torch.Tensor, before: Callable[[], object], after: Callable[[], object]
) -> float:
    """Seconds of one forward and backward, and of what is done before and after the forward."""
    model.zero_grad(set_to_none=True)
    _wait(tokens_BS)
    clock = time.perf_counter if tokens_BS.is_cuda else time.process_time
    start = clock()
    before()
    loss = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
    after()
    loss.backward()
    _wait(tokens_BS)
    return clock() - start


def report(measured: dict[str, list[tuple[float, float]]]) -> None:
    """Print one line a way."""
    base = np.array(measured["without moe-replay"])[:, 0]
    print(f"{'':28} {'median s':>9} {'min s':>8} {'ratio':>7} {'':7} {'inside ours':>12}")
    for name, pairs in measured.items():
        taken, ours = np.array(pairs).T
        low, middle, high = np.percentile(taken / base, [25, 50, 75])
        own = f"{np.median(ours) / np.median(base):.2%}" if ours.any() else ""
        spread = f"{middle:7.3f} ± {(high - low) / 2:.3f}"
        print(f"{name:28} {np.median(taken):9.3f} {taken.min():8.3f} {spread} {own:>12}", flush=True)


def _wait(like: torch.Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
