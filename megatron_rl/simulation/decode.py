"""This module computes how long engines take to decode responses of known lengths by continuous batching.

An engine advances all of its responses by one token per iteration, and an iteration takes longer the more there are. So
only the order of lengths matters, and the engines of a cluster are worked out side by side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Seconds of one iteration, for any number of responses that it advances.
IterationSeconds = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Holds for every engine: seconds until its last response ended, iterations, tokens, and responses."""

    seconds: np.ndarray
    iterations: np.ndarray
    tokens: np.ndarray
    responses: np.ndarray


def decode(lengths: Sequence[np.ndarray], slots: int, iteration_seconds: IterationSeconds) -> Decoded:
    """Simulate engines that each run the responses of their own queue in order, at most `slots` at once.

    lengths: for every engine the tokens of its responses, each at least 1.
    """
    num_engines, most = len(lengths), max((len(queue) for queue in lengths), default=0)
    queue = np.full((num_engines, most + 1), math.inf)
    for row, own in zip(queue, lengths, strict=True):
        row[: len(own)] = own
    width = max(1, min(slots, most))
    left = queue[:, :width].copy()  # tokens to go of what runs; infinite where nothing does
    following = np.full(num_engines, width)
    seconds, iterations = np.zeros(num_engines), np.zeros(num_engines)
    while True:
        running = np.isfinite(left)
        count = running.sum(1)
        if not count.any():
            break
        advance = np.where(count > 0, left.min(1), 0.0)
        seconds += np.where(count > 0, advance * iteration_seconds(np.maximum(count, 1)), 0.0)
        iterations += advance
        left -= advance[:, None]
        engines, places = np.nonzero(left <= 0)
        # Those of one engine that end together take the next of its queue one by one.
        nth = np.arange(len(engines)) - np.searchsorted(engines, engines)
        left[engines, places] = queue[engines, np.minimum(following[engines] + nth, most)]
        following = following + np.bincount(engines, minlength=num_engines)
    return Decoded(
        seconds=seconds,
        iterations=iterations,
        tokens=np.array([float(np.sum(own)) for own in lengths]),
        responses=np.array([len(own) for own in lengths]),
    )
