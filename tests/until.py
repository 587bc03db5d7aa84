"""Waits for what a test needs.

Only a test that fails meets the deadline, so it is long: a right program on a busy machine is never late for it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SECONDS = 600.0


def wait_until(condition: Callable[[], T], what: str, *, pause: float = 0.02) -> T:
    """Wait until `condition()` is true, and return what it is then. what: the condition in words, for the failure."""
    give_up = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < give_up, f"after {SECONDS:g} s still not so: {what}"
        time.sleep(pause)
    return found


async def until(condition: Callable[[], T], what: str, *, pause: float = 0.01) -> T:
    """Do what `wait_until` does, and let the event loop go on meanwhile."""
    give_up = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < give_up, f"after {SECONDS:g} s still not so: {what}"
        await asyncio.sleep(pause)
    return found
