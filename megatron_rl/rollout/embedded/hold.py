"""Ends what a client began and then left alone: a pause, or a session of weight updates."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager


class Hold:
    """Ends a state by itself when nobody has touched it for `seconds`. It belongs to one event loop."""

    def __init__(self, seconds: float, is_held: Callable[[], bool], let_go: Callable[[], Awaitable[None]]) -> None:
        """Watch a state for its end. is_held: whether there is something to end. let_go: ends it and says so in the
        log."""
        self._seconds, self._is_held, self._let_go = seconds, is_held, let_go
        self._at_work = 0
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Future[None] | None = None

    @contextmanager
    def touched(self) -> Iterator[None]:
        """Note that somebody begins, uses or ends the state. The time starts anew when that succeeds, and goes on if it
        fails.

        So a client that asks again and again for the end of the state does not keep it alive.
        """
        loop = asyncio.get_running_loop()
        self._at_work += 1
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield
            self._deadline = loop.time() + self._seconds
        finally:
            self._at_work -= 1
            if not self._at_work and self._is_held():
                self._timer = loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        self._ending = asyncio.ensure_future(self._let_go())
