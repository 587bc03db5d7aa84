"""This module draws the response lengths of a run that was not made: groups of responses to one prompt, from a
distribution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.schema import RlConfig

# The deviation of the logarithms of ServeGen's DeepSeek-R1 output lengths (arXiv 2505.09999), which are near to normal.
LOG_DEVIATION = 0.97
_NUM_QUANTILES = 100_000
# Measured on 8 responses of Qwen2.5-Math to each of 100 MATH problems, by `group_correlation`.
GROUP_CORRELATION = 0.83
# Assumed for prompts of which nothing is known.
PROMPT_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Groups:
    """Holds drawn groups. lengths: int64 [n, K], tokens of the responses of n groups, each at least 1. kept: bool [n],
    False where all rewards are equal, which dynamic sampling drops."""

    lengths: np.ndarray
    kept: np.ndarray


# The groups of the next n prompts.
Take = Callable[[int], Groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Describes what a run that was not made would sample.

    lengths: those of responses, any number of them. told: where they are from, in words. correlation, uniform_share:
    see `Lengths`. prompt_tokens: those of every prompt, or the mean.
    """

    lengths: np.ndarray
    told: str
    correlation: float = GROUP_CORRELATION
    uniform_share: float = 0.0
    prompt_tokens: float

    def draw(self, group_size: int, seed: int) -> "Lengths":
        return Lengths(self.lengths, group_size, self.correlation, self.uniform_share, seed)


class Lengths:
    """Draws groups.

    Members of a group resemble each other: their places in the distribution are those of normal numbers with this
    correlation (a Gaussian copula). At 0 the members are independent, at 1 they are equal.
    """

    def __init__(
        self, lengths: np.ndarray, group_size: int, correlation: float, uniform_share: float, seed: int
    ) -> None:
        """Prepare to draw. lengths: any number of them. uniform_share: that of groups whose rewards are all equal."""
        for name, value in (("correlation of a group's lengths", correlation), ("uniform share", uniform_share)):
            if not 0 <= value <= 1:
                raise ValueError(f"the {name} must be from 0 to 1, got {value:g}")
        self._sorted, self._size = np.sort(lengths), group_size
        self._correlation, self._uniform = correlation, uniform_share
        self._random = np.random.default_rng(seed)

    def take(self, num_groups: int) -> Groups:
        from scipy.special import ndtr

        shared = self._random.standard_normal((num_groups, 1))
        own = self._random.standard_normal((num_groups, self._size))
        place = ndtr(np.sqrt(self._correlation) * shared + np.sqrt(1 - self._correlation) * own)
        lengths = self._sorted[np.minimum((place * len(self._sorted)).astype(np.int64), len(self._sorted) - 1)]
        return Groups(lengths, self._random.random(num_groups) >= self._uniform)


def lognormal() -> np.ndarray:
    """Return lengths of an assumed shape, which `scaled` then scales."""
    from scipy.special import ndtri

    return np.exp(LOG_DEVIATION * ndtri((np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES))


def assumed(config: RlConfig, cluster: ClusterSection, mean: float | None = None) -> Workload:
    """Return the workload of a run of which nothing is known: log-normal lengths. Their default mean is the one that
    the configuration was written for, with which the first phase fills the budget."""
    rollout = config.rollout
    responses = rollout.prompts_per_step * rollout.samples_per_prompt
    if mean is None:
        tokens = sum(config.phase_budgets(cluster.training_ranks)) or config.half_length_tokens
        mean = min(tokens / responses, 0.9 * rollout.max_response_tokens)
    lengths = scaled(lognormal(), mean, rollout.max_response_tokens)
    prompt = min(PROMPT_TOKENS, rollout.max_prompt_tokens)
    return Workload(lengths=lengths, told=f"log-normal, assumed, of a mean of {mean:,.0f}", prompt_tokens=prompt)


def read_lengths(path: Path) -> np.ndarray:
    """Read one length per line. ValueError for a file that holds none."""
    try:
        lengths = np.array([float(line) for line in path.read_text(encoding="utf-8").split()])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of response lengths, one per line ({error})") from None
    if not len(lengths) or lengths.min() <= 0:
        raise ValueError(f"{path} must hold lengths above 0, one per line")
    return lengths


def scaled(lengths: np.ndarray, mean: float | None, longest: int) -> np.ndarray:
    """Scale lengths so that their mean is `mean` once all over `longest` are cut to it; int64. None leaves them as they
    are but for the cut. ValueError for a mean that no scale gives."""
    if mean is None:
        return np.clip(np.rint(lengths), 1, longest).astype(np.int64)
    if not 1 <= mean < longest:
        raise ValueError(f"a mean length of {mean:g} is not between 1 and rollout.max_response_tokens = {longest}")
    low, high = 0.0, 1.0
    while np.minimum(lengths * high, longest).mean() < mean:
        high *= 2
    for _ in range(60):  # the mean grows with the scale
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(lengths * middle, longest).mean() < mean else (low, middle)
    return np.clip(np.rint(lengths * high), 1, longest).astype(np.int64)


def group_correlation(groups: Sequence[np.ndarray]) -> float:
    """Compute the correlation that `Lengths` takes from lengths of real groups of one size K > 1: the share of variance
    between groups (one-way analysis of variance, Fisher's intraclass correlation) of their normal scores."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    table = np.stack(groups)
    scores = ndtri((rankdata(table) - 0.5) / table.size).reshape(table.shape)
    size = table.shape[1]
    between = size * scores.mean(1).var(ddof=1)
    within = scores.var(1, ddof=1).mean()
    return float(np.clip((between - within) / (between + (size - 1) * within), 0.0, 1.0))
