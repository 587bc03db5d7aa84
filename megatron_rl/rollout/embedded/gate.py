"""Who may use the engine when: requests together, a weight update alone, nobody new during a pause."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from megatron_rl.rollout.embedded.hold import Hold


class Gate:
    """Of one event loop. As in SGLang a pause holds requests back here, before the engine ever sees them.

    An update waits for the requests that are inside, and those that come meanwhile wait for it. During a pause it
    waits for nobody: what is inside stands still.

    A pause ends by itself after `pause_seconds` in which nobody paused again or updated weights.
    """

    def __init__(self, pause_seconds: float, end_pause: Callable[[], Awaitable[None]]) -> None:
        """end_pause: lets the engine go on and calls `resume`."""
        self.paused = False
        self._pause = Hold(pause_seconds, lambda: self.paused, end_pause)
        self._inside = 0
        self._updates = 0  # waiting or at work
        self._updating = asyncio.Lock()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def generating(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self.paused and not self._updates)
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            await self._tell()

    @asynccontextmanager
    async def updating(self) -> AsyncIterator[None]:
        self._updates += 1
        try:
            with self._pause.touched():
                async with self._changed:
                    await self._changed.wait_for(lambda: self.paused or not self._inside)
                async with self._updating:
                    yield
        finally:
            self._updates -= 1
            await self._tell()

    async def pause(self) -> None:
        with self._pause.touched():
            self.paused = True
        await self._tell()  # an update that waits for the requests inside need not wait any longer

    async def resume(self) -> None:
        with self._pause.touched():
            self.paused = False
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
