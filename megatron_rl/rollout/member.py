"""Describes a generation server as the pool of servers keeps it (pool.py)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.rollout.client import GenerationClient, ServerLost

SignOfLife = Callable[[GenerationClient, float], Coroutine[Any, Any, bool]]


@dataclass(slots=True, eq=False)
class Member:
    """Holds a server of the pool. out: why it gets no work, None while it does. needs_weights: it is out for want of
    nothing but the weights of the next push. in_flight: what waits for its answers, each ended when it is taken out.

    num_losses: how often it was taken out; what was agreed with it before does not hold with the one that comes back.
    released: parts of its memory that it has given back.
    """

    client: GenerationClient
    in_flight: set[asyncio.Timeout] = field(default_factory=set)
    out: str | None = None
    needs_weights: bool = False
    num_losses: int = 0
    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    released: frozenset[str] = frozenset()
    sign_of_life: SignOfLife = GenerationClient.is_healthy
    watch: "asyncio.Task[None] | None" = None
    recovery: "asyncio.Task[None] | None" = None


def is_running(task: "asyncio.Task[Any] | None") -> bool:
    """Tell whether a task was started and has not ended."""
    return task is not None and not task.done()


@contextlib.asynccontextmanager
async def unless_lost(member: Member) -> AsyncIterator[None]:
    """Wait for an answer of a member inside the block. Raise ServerLost as soon as it is taken out."""
    try:
        async with asyncio.timeout(None) as waiting:
            member.in_flight.add(waiting)
            try:
                yield
            finally:
                member.in_flight.discard(waiting)
    except TimeoutError:
        if not waiting.expired():
            raise
        raise ServerLost(f"{member.client.url} was taken out while it was asked") from None
