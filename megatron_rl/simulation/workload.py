"""Response lengths of a run that was not made: groups of responses to one prompt, from a distribution."""

from pathlib import Path

import numpy as np
from scipy.special import ndtr


class Lengths:
    """Draws the lengths of groups.

    The members of a group resemble each other: their places in the distribution are those of normal numbers with this
    correlation (a Gaussian copula). 0 makes all responses alike, 1 all members of a group equal.
    """

    def __init__(self, lengths: np.ndarray, group_size: int, correlation: float, seed: int) -> None:
        if not 0 <= correlation <= 1:
            raise ValueError(f"the correlation of a group's lengths must be from 0 to 1, got {correlation:g}")
        self._sorted, self._size, self._correlation = np.sort(lengths), group_size, correlation
        self._random = np.random.default_rng(seed)

    @property
    def mean(self) -> float:
        return float(self._sorted.mean())

    def take(self, num_groups: int) -> np.ndarray:
        """int64 [num_groups, group size], each at least 1."""
        shared = self._random.standard_normal((num_groups, 1))
        own = self._random.standard_normal((num_groups, self._size))
        place = ndtr(np.sqrt(self._correlation) * shared + np.sqrt(1 - self._correlation) * own)
        return self._sorted[np.minimum((place * len(self._sorted)).astype(np.int64), len(self._sorted) - 1)]


def read_lengths(path: Path, mean: float | None, longest: int) -> np.ndarray:
    """One length per line, scaled so that their mean is `mean` once all over `longest` are cut to it. ValueError for a
    file that holds none, and for a mean that no scale gives."""
    try:
        raw = np.array([float(line) for line in path.read_text().split()])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of response lengths, one per line ({error})") from None
    if not len(raw) or raw.min() <= 0:
        raise ValueError(f"{path} must hold lengths above 0, one per line")
    if mean is not None and not 1 <= mean < longest:
        raise ValueError(f"a mean length of {mean:g} is not between 1 and rollout.max_response_tokens = {longest}")
    scale = 1.0 if mean is None else _scale(raw, mean, longest)
    return np.clip(np.rint(raw * scale), 1, longest).astype(np.int64)


def _scale(raw: np.ndarray, mean: float, longest: int) -> float:
    """By bisection: the mean of what is cut grows with the scale, up to `longest`."""
    low, high = 0.0, 1.0
    while np.minimum(raw * high, longest).mean() < mean:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(raw * middle, longest).mean() < mean else (low, middle)
    return high
