"""Runs an event loop in a thread of its own, so that its tasks go on while the calling thread trains.

The pool's tasks wait for a lost server and bring it back. If the loop ran only while somebody waits for a result, they
would stand still during a train phase, but their deadlines would pass.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Owns the thread of an event loop. `close()` cancels what still runs on the loop and ends it."""

    def __init__(self) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def live() -> None:
            end = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), end))
            await end.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), name="event-loop", daemon=True)
        self._thread.start()
        self._loop, self._end = started.result()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. Call it from another thread than the loop's."""
        return self.start(work).result()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Have the loop do `work`, and wait for nothing."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
