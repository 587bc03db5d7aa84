"""Has an event loop with a clock of its own, so that a test of seconds depends on no machine's speed."""

import asyncio
import selectors


class ClockLoop(asyncio.SelectorEventLoop):
    """Is an event loop whose time goes on by itself only while it waits for a timer, and else when `hold` says so.

    What runs on it takes no time. It has no connections and no threads.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_TimerSelector(self))

    def time(self) -> float:
        return self.now

    def hold(self, seconds: float) -> None:
        """Keep the loop from going on for some seconds, as work in its thread does."""
        self.now += seconds


class _TimerSelector(selectors.DefaultSelector):
    """Lets the loop's time go on by as long as the loop would wait."""

    def __init__(self, loop: ClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "the loop waits for something that never comes"
        self._loop.now += timeout
        return super().select(0)
