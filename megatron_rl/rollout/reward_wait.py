"""Measures for how long a phase waits for rewards alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RewardWait:
    """Counts the seconds in which something is judged and nothing is sampled: with faster rewards they were not there.
    Use it in one event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._num_sampled = self._num_judged = 0
        self._since = self._seconds = 0.0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Count a response as sampled while the block runs."""
        self._change(1, 0)
        try:
            yield
        finally:
            self._change(-1, 0)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Count responses as judged while the block runs."""
        self._change(0, 1)
        try:
            yield
        finally:
            self._change(0, -1)

    def take_seconds(self) -> float:
        """Return the seconds since the last call."""
        self._change(0, 0)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _change(self, sampled: int, judged: int) -> None:
        now = self._clock()
        if self._num_judged and not self._num_sampled:
            self._seconds += now - self._since
        self._since = now
        self._num_sampled += sampled
        self._num_judged += judged
