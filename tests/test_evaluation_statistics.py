"""Tests pass@k and maj@k against every way to draw k samples, and intervals against simulated experiments."""

import math
from collections import Counter
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.evaluation.statistics import Estimate, estimate, majority_at, mean_of, pass_at, wilson


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            drawn = [any(some) for some in combinations(samples, k)]
            assert pass_at(k, num_samples, num_correct) == pytest.approx(fmean(drawn), abs=1e-15)


def test_pass_at_k_loses_no_digits() -> None:
    assert pass_at(1, 10**6, 1) == 1e-6
    # 1 - prod over i < 500 of (1 - 1 / (10^6 - i)), which telescopes to 500 / 10^6
    assert pass_at(500, 10**6, 1) == 5e-4
    assert pass_at(900, 1000, 101) == 1.0


def test_pass_at_k_has_no_bias() -> None:
    # Over everything that n = 6 samples of success rate p can be: 1 - (1 - p)^k.
    for p in (0.0, 0.13, 0.5, 1.0):
        for k in range(1, 7):
            expected = sum(math.comb(6, c) * p**c * (1 - p) ** (6 - c) * pass_at(k, 6, c) for c in range(7))
            assert expected == pytest.approx(1 - (1 - p) ** k)


def vote(answers: tuple[str, ...]) -> float:
    """Return the probability that a majority vote gives "right". "" does not vote, and ties are drawn by lot."""
    votes = Counter(answer for answer in answers if answer)
    best = [answer for answer, count in votes.items() if count == max(votes.values())]
    return best.count("right") / len(best) if best else 0.0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["right", "a", "b", "c", "d", ""]), min_size=1, max_size=9), st.data())
def test_maj_at_k_is_the_mean_over_all_draws(answers: list[str], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    others = [count for answer, count in Counter(answers).items() if answer not in ("right", "")]
    found = majority_at(k, answers.count("right"), others, answers.count(""))
    assert found == pytest.approx(fmean(vote(some) for some in combinations(answers, k)), abs=1e-12)


def test_maj_at_k_by_hand() -> None:
    assert majority_at(1, 3, [2, 4], 1) == 0.3  # one sample: avg
    assert majority_at(5, 2, [2, 1]) == 0.5  # a tie of two
    assert majority_at(3, 1, [1, 1]) == 1 / 3  # a tie of three
    assert majority_at(8, 1, [], 7) == 1.0  # the only one that says anything
    assert majority_at(4, 0, [], 4) == 0.0  # nobody says anything
    assert majority_at(64, 33, [31]) == 1.0


def test_maj_at_k_of_many_samples_is_quick_and_between_its_bounds() -> None:
    for k in (8, 32, 63):
        found = majority_at(k, 16, [8, 8, *[1] * 30], 2)
        assert 16 / 64 < found <= pass_at(k, 64, 16)


def test_one_sample_per_prompt_has_wilsons_interval() -> None:
    # Worked out by hand from the roots of (p - share)^2 = z^2 p (1 - p) / n.
    for right, count in ((0, 30), (7, 30), (30, 30), (512, 1024)):
        share, z2 = right / count, 1.959964**2
        low, high = sorted(np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2]).real)
        found = estimate([1.0] * right + [0.0] * (count - right), 1)
        assert (found.value, found.low, found.high) == pytest.approx((share, low, high), abs=1e-6)


def test_a_prompts_samples_narrow_the_interval_only_as_far_as_they_differ() -> None:
    alike = estimate([1.0] * 10 + [0.0] * 10, 8)  # all samples of a prompt say the same
    assert alike == wilson(0.5, 20)
    mixed = estimate([0.5] * 20, 8)  # nothing between prompts: as good as 160 samples
    assert mixed == wilson(0.5, 160)
    between = estimate([0.25, 0.5, 0.75, 0.5] * 5, 8)
    assert alike.low < between.low < mixed.low
    assert estimate([0.5], 8) == wilson(0.5, 1)  # of one prompt nobody knows what others would be


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_an_interval_is_never_empty_and_holds_its_value(counts: list[int]) -> None:
    found = estimate([count / 8 for count in counts], 8)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 1e-3
    pooled = mean_of([found, Estimate(value=0.0, low=0.0, high=0.1)])
    assert 0 <= pooled.low <= pooled.value < pooled.high <= 1


@pytest.mark.parametrize(
    ("num_prompts", "num_samples", "spread"),
    [(30, 1, (0.5, 0.5)), (30, 8, (0.3, 0.5)), (100, 4, (2.0, 4.0)), (60, 16, (0.5, 5.0))],
)
def test_19_of_20_experiments_have_the_truth_in_their_interval(
    num_prompts: int, num_samples: int, spread: tuple[float, float]
) -> None:
    # Success rates of prompts are drawn from a beta distribution, mostly with much mass at 0 and 1, as benchmarks have.
    rng = np.random.default_rng(0)
    truth = spread[0] / sum(spread)
    held = []
    for _ in range(2000):
        rates = rng.beta(*spread, num_prompts)
        values = rng.binomial(num_samples, rates) / num_samples
        found = estimate(values.tolist(), num_samples)
        held.append(found.low <= truth <= found.high)
    assert 0.93 < fmean(held) < 0.98


def test_the_interval_of_a_mean_of_benchmarks_holds_the_truth_as_often() -> None:
    rng = np.random.default_rng(1)
    truths, sizes, held = (0.02, 0.5, 0.9), (30, 200, 80), []
    for _ in range(2000):
        drawn = [rng.binomial(size, truth) / size for size, truth in zip(sizes, truths, strict=True)]
        found = mean_of([wilson(share, size) for share, size in zip(drawn, sizes, strict=True)])
        held.append(found.low <= fmean(truths) <= found.high)
    assert 0.93 < fmean(held) < 0.98
    one = mean_of([wilson(0.3, 50)])
    assert (one.low, one.high) == pytest.approx((wilson(0.3, 50).low, wilson(0.3, 50).high))
