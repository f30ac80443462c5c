import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.routing.metrics import (
    deviation_by_layer,
    expert_load,
    extreme_fraction,
    load_imbalance,
    policy_health,
    topk_agreement,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "methods.md"
REPORTS = ROOT / "moe_replay" / "reports"
PACKAGE = ROOT / "moe_replay"
SOURCES = [
    PACKAGE / "alarm.py",
    PACKAGE / "routing" / "metrics.py",
    REPORTS / "results.py",
    REPORTS / "predictor_report.py",
]
GROUPS = (
    "alarm",
    "mismatch",
    "routing",
    "predictor",
    "policy",
    "reward",
    "rollout",
    "response",
    "eval",
    "archive",
    "time",
)


def routes(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_layers, num_experts, generator=generator).topk(top_k).indices


@st.composite
def pairs(draw):
    """Two routes of the same tokens through the same model."""
    num_experts = draw(st.integers(1, 12))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 3)), num_experts, draw(st.integers(1, num_experts)))
    return routes(*shape, draw(st.integers(0, 99))), routes(*shape, draw(st.integers(0, 99)))


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_agreement_is_the_share_of_common_experts_of_each_token_and_layer(pair):
    one, other = pair
    expected = [
        [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(*layers, strict=True)]
        for layers in zip(one, other, strict=True)
    ]
    assert torch.allclose(topk_agreement(one, other), torch.tensor(expected))


@settings(max_examples=50, deadline=None)
@given(pairs(), st.randoms(use_true_random=False))
def test_agreement_does_not_depend_on_the_order_of_experts(pair, random):
    one, other = pair
    order = list(range(one.shape[-1]))
    random.shuffle(order)
    assert torch.equal(topk_agreement(one[..., order], other), topk_agreement(one, other))


def test_three_and_more_wrong_experts_share_a_bin():
    replayed = torch.tensor([[[0, 1, 2, 3, 4]]] * 4)
    live = torch.tensor([[[4, 3, 2, 1, 0]], [[0, 1, 2, 3, 9]], [[0, 1, 9, 8, 7]], [[9, 8, 7, 6, 5]]])
    assert deviation_by_layer(replayed, live).tolist() == [[0.25, 0.25, 0.0, 0.5]]


def test_without_tokens_the_load_is_even():
    assert load_imbalance(expert_load(torch.zeros(0, 2, 2, dtype=torch.int64), 4)) == 1.0


def test_a_token_is_extreme_when_its_ratio_passes_two_either_way():
    rollout = torch.zeros(1, 5)
    train = torch.tensor([[math.log(1.9), math.log(2.1), -math.log(1.9), -math.log(2.1), 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert extreme_fraction(train, rollout, mask) == 0.5


def test_an_empty_mask_has_no_extreme_token():
    assert extreme_fraction(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)) == 0.0


def test_load_is_compared_with_the_mean_over_all_experts_of_each_layer():
    even = torch.tensor([[[0, 1], [0, 1]], [[2, 3], [2, 3]]])
    assert load_imbalance(expert_load(even, 4)) == 1.0
    one_layer_collapsed = torch.tensor([[[0, 1], [0, 1]], [[2, 3], [0, 1]]])
    assert load_imbalance(expert_load(one_layer_collapsed, 4)) == pytest.approx((1 + 2) / 2)


def test_load_counts_ids_as_narrow_as_they_are_stored():
    ids = torch.full((300, 1, 1), 255, dtype=torch.uint8)
    assert load_imbalance(expert_load(ids, 256)) == 256


def health(ratios, advantages, mask=None, whole_sequences=False):
    log_probs = torch.tensor(ratios).log()
    mask = torch.ones(log_probs.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    old = torch.full(log_probs.shape, -1.0)
    return policy_health(log_probs - 1.0, old, torch.tensor(advantages), mask, (0.2, 0.28), whole_sequences)


def test_clipping_counts_only_tokens_whose_gradient_it_cuts():
    found = health([[0.5, 0.5, 1.5, 1.5]], [[-1.0, 1.0, 1.0, -1.0]])
    assert (found["policy/clip_low"], found["policy/clip_high"]) == (0.25, 0.25)


def test_padding_takes_no_part_in_policy_health():
    found = health([[1.0, 1.1], [9.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]], [[True, True], [False, False]])
    assert found["policy/clip_high"] == 0
    assert found["policy/ratio_max"] == pytest.approx(1.1)
    assert found["policy/kl_old"] == pytest.approx(-math.log(1.1) / 2)


def test_whole_sequences_are_clipped_by_their_geometric_mean():
    tokens, mask = [[4.0, 1.0, 7.0]], [[True, True, False]]
    assert health(tokens, [[1.0, 1.0, 1.0]], mask)["policy/clip_high"] == 0.5
    found = health(tokens, [[1.0, 1.0, 1.0]], mask, whole_sequences=True)
    assert found["policy/ratio_max"] == pytest.approx(2.0)
    assert found["policy/clip_high"] == 1.0


def test_policy_health_agrees_with_verls_clip_fraction(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")  # for good: verl chooses once, when it is first imported
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import FSDPActorConfig

    generator = torch.Generator().manual_seed(0)
    old, new, advantages = (torch.randn(4, 6, generator=generator) * scale for scale in (0.1, 0.4, 1.0))
    mask = torch.rand(4, 6, generator=generator) > 0.2
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=4, clip_ratio_low=0.2, clip_ratio_high=0.28
    )
    policy_loss: Any = compute_policy_loss_vanilla  # its decorator hides its parameters
    _, seen = policy_loss(old, new, advantages, mask.float(), config=config)
    found = policy_health(new, old, advantages, mask, (0.2, 0.28), whole_sequences=False)
    assert found["policy/clip_low"] + found["policy/clip_high"] == pytest.approx(float(seen["actor/pg_clipfrac"]))
    assert found["policy/kl_old"] == pytest.approx(float(seen["actor/ppo_kl"]), abs=1e-6)


def test_every_metric_that_stages_log_is_documented_and_no_other():
    assert documented_keys() == logged_keys()


def documented_keys() -> set[str]:
    """Keys in the first column of the document's tables, `{name}` written `*`."""
    keys = re.findall(r"^\| `([a-z0-9_]+/[^`]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    return {re.sub(r"\{.*?\}", "*", key) for key in keys}


def logged_keys() -> set[str]:
    """Metric keys in the code of stages, metrics and results: whole literals, with a `*` for what is filled in."""
    keys = set()
    for path in [*SOURCES, *(PACKAGE / "stages").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            text = re.sub(r"\{.*?\}", "*", ast.unparse(node).removeprefix("f")[1:-1]) if _is_text(node) else ""
            if re.fullmatch(rf"({'|'.join(GROUPS)})/[a-z0-9_/*]*[a-z0-9*]", text):
                keys.add(text)
    return keys


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
