"""Computes what n judged samples of each prompt say: pass@k, maj@k, and how far chance may have gone. Pure functions.

A prompt was sampled n times, c of the samples are correct. "At k" is the mean over all ways to draw k of the n samples,
computed exactly, so that it does not depend on which ones happen to be drawn.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

Z_95 = 1.959964  # 95 % of a normal distribution lies within this many standard deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Holds a share, or a mean of scores that may be any number; `low` and `high` bound it with 95 % confidence.

    is_share: it is between 0 and 1 by its kind.
    """

    value: float
    low: float
    high: float
    is_share: bool = True


def student_95(degrees: int) -> float:
    """Return t such that Student's t distribution with `degrees` degrees of freedom, at least 1, holds 95 % within +-
    t."""
    from scipy.stats import t  # takes most of a second, which `megatron-rl --help` need not wait

    return float(t.ppf(0.975, degrees))


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """Return 1 - C(n - c, k) / C(n, k): the chance that one of k samples is correct, without bias (Chen et al. 2021,
    arXiv 2107.03374, Eq. 1). In whole numbers up to the last division, so nothing is lost to cancellation."""
    ways = comb(num_samples, k)
    return (ways - comb(num_samples - num_correct, k)) / ways


def majority_at(k: int, num_correct: int, others: Sequence[int], num_silent: int = 0) -> float:
    """Return the chance that the correct answer gets the most votes among k samples; a tie is decided by a fair draw.

    others: how many samples gave each of the other answers. num_silent: samples that gave none; they do not vote.
    """
    num_wrong = sum(others) + num_silent
    least = max(1, k - num_wrong)
    won = sum(
        comb(num_correct, votes) * _not_outvoted(votes, k - votes, others, num_silent)
        for votes in range(least, min(k, num_correct) + 1)
    )
    return float(Fraction(won) / comb(num_correct + num_wrong, k))


def _not_outvoted(votes: int, num_drawn: int, others: Sequence[int], num_silent: int) -> Fraction:
    """Return 1 / (1 + answers that have `votes` too), summed over all ways to draw `num_drawn` samples of the other
    answers so that none of them has more."""
    ways = Counter({(0, 0): 1})  # by samples drawn and answers tied
    for size in others:
        longer: Counter[tuple[int, int]] = Counter()
        for (drawn, tied), number in ways.items():
            for more in range(min(size, votes, num_drawn - drawn) + 1):
                longer[drawn + more, tied + (more == votes)] += number * comb(size, more)
        ways = longer
    parts = (Fraction(n * comb(num_silent, num_drawn - drawn), 1 + tied) for (drawn, tied), n in ways.items())
    return sum(parts, Fraction())


def estimate(values: Sequence[float], num_samples: int, is_share: bool = True) -> Estimate:
    """Return the mean over prompts of `values` in [0, 1], with Wilson's interval for the effective number of trials.

    is_share: where not, the values may be any numbers, and have Student's t interval with the prompts as units.

    Samples of one prompt depend on each other, so the prompts are the units (Miller 2024, arXiv 2411.00640). The
    variance of their mean, s^2 / m, is that of p(1 - p) / (s^2 / m) independent trials (Kish's design effect): never
    fewer than the m prompts and never more than the m * n samples, whatever s^2 happens to be. So one sample per prompt
    has Wilson's own interval, and 0 % and 100 % an interval as wide as if all samples of a prompt were one.
    """
    num_prompts, mean = len(values), math.fsum(values) / len(values)
    if not is_share:
        return _student(values, mean)
    least, most = num_prompts, num_prompts * num_samples
    binomial = mean * (1 - mean)
    squares = math.fsum((value - mean) ** 2 for value in values)
    if num_prompts == 1 or binomial <= 0:
        trials = float(least)
    elif squares == 0:
        trials = float(most)
    else:
        trials = min(max(binomial * num_prompts * (num_prompts - 1) / squares, least), most)
    return wilson(mean, trials)


def _student(values: Sequence[float], mean: float) -> Estimate:
    """Return the mean with Student's t interval, which has no bounds for one value: it says nothing of how far others
    may be."""
    count = len(values)
    if count == 1:
        return Estimate(value=mean, low=-math.inf, high=math.inf, is_share=False)
    squares = math.fsum((value - mean) ** 2 for value in values)
    far = student_95(count - 1) * math.sqrt(squares / (count - 1) / count)
    return Estimate(value=mean, low=mean - far, high=mean + far, is_share=False)


def wilson(share: float, trials: float) -> Estimate:
    """Return Wilson's score interval (1927) of a share that was observed in `trials` independent trials."""
    shrink = Z_95**2 / trials
    centre = share + shrink / 2
    spread = math.sqrt(shrink * (share * (1 - share) + shrink / 4))
    low, high = (centre - spread) / (1 + shrink), (centre + spread) / (1 + shrink)
    return Estimate(value=share, low=max(0.0, min(low, share)), high=min(1.0, max(high, share)))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the plain mean of independent estimates. Their distances to each end add up in squares (MOVER; Zou and
    Donner 2008), which keeps the intervals of 0 % and 100 % one-sided and never empty."""
    count = len(estimates)
    value = math.fsum(e.value for e in estimates) / count
    below = math.sqrt(math.fsum((e.value - e.low) ** 2 for e in estimates)) / count
    above = math.sqrt(math.fsum((e.high - e.value) ** 2 for e in estimates)) / count
    if not all(e.is_share for e in estimates):
        return Estimate(value=value, low=value - below, high=value + above, is_share=False)
    return Estimate(value=value, low=max(0.0, value - below), high=min(1.0, value + above))
