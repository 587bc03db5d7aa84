"""Measures how late an event loop runs, and has a clock that stands still while the loop is late.

A late loop has not read replies that have already come, so this time must not count as a server's silence.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_TICK_SECONDS = 0.1


class LoopLag:
    """Measures on the running loop, from `start` to `close`, how much later than asked for it runs a callback."""

    def __init__(self) -> None:
        self._late_seconds = self._largest = 0.0
        self._due = math.inf  # never late before `start`
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = time.monotonic()
        self._tick()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._due = math.inf

    def clock(self) -> float:
        """Return seconds, without those in which the loop was late or still is."""
        now = time.monotonic()
        return now - self._late_seconds - max(0.0, now - self._due)

    def take_largest(self) -> float:
        """Return the longest time that the loop was late since the last call, in seconds."""
        largest, self._largest = max(self._largest, time.monotonic() - self._due), 0.0
        return largest

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        """Limit the time of a block by this clock, as `asyncio.timeout` does by the loop's. An answer that waits for a
        late loop is not late itself."""
        loop, deadline = asyncio.get_running_loop(), self.clock() + seconds
        handle: asyncio.TimerHandle | None = None
        async with asyncio.timeout(None) as limit:

            def look() -> None:
                nonlocal handle
                left = deadline - self.clock()
                if left > 0:
                    handle = loop.call_later(left, look)
                else:
                    limit.reschedule(loop.time())

            look()
            try:
                yield
            finally:
                if handle is not None:
                    handle.cancel()

    def _tick(self) -> None:
        now = time.monotonic()
        late = max(0.0, now - self._due)
        self._late_seconds += late
        self._largest = max(self._largest, late)
        self._due = now + _TICK_SECONDS
        self._handle = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)
