"""Intervals and verdicts: do they cover, do they find what was planted, and nothing else?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.reports.bootstrap import estimate, paired_difference


def test_a_planted_difference_is_found_with_its_sign():
    baseline_SN = np.random.default_rng(0).normal(size=(3, 25))
    lower = paired_difference(baseline_SN - 1, baseline_SN, "mean")
    assert lower.value == pytest.approx(-1)
    assert lower.verdict == "lower"
    assert paired_difference(baseline_SN + 1, baseline_SN, "p90").verdict == "higher"


def test_pairing_finds_what_scatters_far_more_than_it_differs():
    rng = np.random.default_rng(0)
    baseline_SN = rng.normal(scale=10, size=(3, 25))
    found = paired_difference(baseline_SN + 0.5 + rng.normal(scale=0.1, size=(3, 25)), baseline_SN, "mean")
    assert found.verdict == "higher"
    assert found.interval[0] < 0.5 < found.interval[1]


def test_no_difference_is_within_noise():
    values_SN = np.random.default_rng(0).normal(size=(3, 25))
    assert paired_difference(values_SN, values_SN, "median").verdict == "within noise"


def test_where_nothing_was_planted_few_differences_leave_noise():
    rng = np.random.default_rng(1)
    found = [paired_difference(*rng.normal(size=(2, 3, 24)), "mean").verdict for _ in range(60)]
    assert found.count("within noise") >= 51


def test_intervals_cover_the_mean():
    rng = np.random.default_rng(2)
    intervals = [estimate(rng.exponential(size=(3, 24)), "mean").interval for _ in range(60)]
    assert sum(low <= 1 <= high for low, high in intervals) >= 51


@pytest.mark.parametrize(
    ("shape", "verdict"), [((5, 1), "too few values"), ((1, 5), "too few values"), ((6, 1), "lower"), ((1, 6), "lower")]
)
def test_less_than_six_values_can_tell_nothing(shape, verdict):
    assert paired_difference(np.zeros(shape), np.ones(shape), "mean").verdict == verdict


def test_seeds_that_differ_widen_the_interval():
    iterations_N = np.random.default_rng(0).normal(size=24)
    alike = estimate(np.stack([iterations_N] * 4), "mean").interval
    apart = estimate(np.stack([iterations_N + shift for shift in (-2, -1, 1, 2)]), "mean").interval
    assert apart[1] - apart[0] > 2 * (alike[1] - alike[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(3, 9), st.sampled_from(["mean", "median", "p90"]))
def test_values_are_the_statistics_and_repeat(seeds, iterations, statistic):
    values_SN = np.random.default_rng(seeds).random((seeds, iterations))
    found = estimate(values_SN, statistic)
    by_hand = {"mean": np.mean(values_SN), "median": np.median(values_SN), "p90": np.quantile(values_SN, 0.9)}
    assert found.value == by_hand[statistic]
    assert values_SN.min() <= found.interval[0] <= found.interval[1] <= values_SN.max()
    assert estimate(values_SN, statistic) == found


def test_values_of_other_seeds_or_iterations_are_not_paired():
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 2)), "mean")
