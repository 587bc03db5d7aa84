"""Decides who may use the engine when: requests together, a weight update alone, nobody new during a pause."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from megatron_rl.rollout.embedded.hold import Hold
from megatron_rl.rollout.embedded.updates import UpdateError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiter:
    is_update: bool
    let_in: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class UpdateLock:
    """Lets requests and updates of one event loop use the engine. As in SGLang a pause holds requests back before the
    engine.

    Requests and updates are let in in the order in which they come, so neither can keep the other out for ever. An
    update waits for the requests that are inside, but not longer than `hold_seconds`: then it is refused, and those
    behind it go on. During a pause it waits for nobody: what is inside stands still.

    A pause ends by itself after `hold_seconds` in which nobody paused again or updated weights.
    """

    def __init__(self, hold_seconds: float, end_pause: Callable[[], Awaitable[None]]) -> None:
        """Begin without a pause. end_pause: lets the engine go on and calls `resume`."""
        self.paused = False
        self._hold_seconds = hold_seconds
        self._pause = Hold(hold_seconds, lambda: self.paused, end_pause)
        self._inside = 0
        self._is_updating = False
        self._waiting: deque[_Waiter] = deque()

    @asynccontextmanager
    async def generating(self) -> AsyncIterator[None]:
        await self._wait(_Waiter(is_update=False))
        try:
            yield
        finally:
            self._leave(is_update=False)

    @asynccontextmanager
    async def updating(self) -> AsyncIterator[None]:
        """Be alone with the engine inside the block. Raise UpdateError when requests run for too long."""
        with self._pause.touched():
            try:
                async with asyncio.timeout(self._hold_seconds):
                    await self._wait(_Waiter(is_update=True))
            except TimeoutError:
                raise UpdateError(
                    f"requests have been running, or other updates waiting for them, for {self._hold_seconds:g} s "
                    "(--hold-timeout); abort or pause them first"
                ) from None
            try:
                yield
            finally:
                self._leave(is_update=True)

    async def pause(self) -> None:
        with self._pause.touched():
            self.paused = True
        self._let_in()  # an update that waits for the requests inside need not wait any longer

    async def resume(self) -> None:
        with self._pause.touched():
            self.paused = False
        self._let_in()

    async def _wait(self, waiter: _Waiter) -> None:
        self._waiting.append(waiter)
        self._let_in()
        try:
            await waiter.let_in
        except asyncio.CancelledError:
            if waiter.let_in.cancelled():
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                self._let_in()
            else:  # it was let in at that very moment
                self._leave(waiter.is_update)
            raise

    def _leave(self, is_update: bool) -> None:
        if is_update:
            self._is_updating = False
        else:
            self._inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        """Let in everybody whose turn it is. Whoever stops waiting meanwhile takes itself out of the queue."""
        while not self._is_updating and (waiter := self._next()) is not None:
            if waiter.is_update and self._inside and not self.paused:
                return
            self._waiting.remove(waiter)
            if not waiter.let_in.cancelled():
                waiter.let_in.set_result(None)
                self._is_updating = waiter.is_update
                self._inside += not waiter.is_update

    def _next(self) -> _Waiter | None:
        if self.paused:
            return next((waiter for waiter in self._waiting if waiter.is_update), None)
        return self._waiting[0] if self._waiting else None
