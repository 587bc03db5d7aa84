"""This module measures how long a device takes for something."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from megatron_rl import device


def seconds_of(run: Callable[[], Any]) -> float:
    device.synchronize()
    started = time.perf_counter()
    run()
    device.synchronize()
    return time.perf_counter() - started


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of `rounds` runs, after one that is not counted."""
    return statistics.median([seconds_of(run) for _ in range(rounds + 1)][1:])


def pace(step: Callable[[int], Any], many: int, rounds: int) -> tuple[float, float]:
    """Return the seconds of one micro-batch, and those that a step takes besides. step: runs an optimizer step of so
    many micro-batches."""
    few = max(1, many // 4)
    # In turns, so that a device that changes its pace changes both.
    both = [[seconds_of(lambda n=n: step(n)) for n in (few, many)] for _ in range(rounds + 1)]  # type: ignore[misc]
    short, long = (statistics.median(column) for column in zip(*both[1:], strict=True))
    each = (long - short) / (many - few)
    return each, long - many * each
