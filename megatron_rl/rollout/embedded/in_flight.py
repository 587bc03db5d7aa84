"""Tracks the requests that have no answer yet: limits how many there are, and delivers each sequence's events."""

import asyncio
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

from megatron_rl.rollout.embedded.engine import EngineStopped
from megatron_rl.rollout.embedded.fields import RequestError, TooMuchInFlight, cut
from megatron_rl.rollout.embedded.protocol import PromptRequest
from megatron_rl.rollout.embedded.sequence import Event, Sequence

# Limits of all requests together. Beyond them a request is refused, because each takes memory from its arrival on.
MAX_SEQUENCES_IN_FLIGHT = 2**18
MAX_FULL_PROMPTS_IN_FLIGHT = 2**14

# A sequence, and the prompt of the request that it is a sample of.
Job = tuple[PromptRequest, Sequence]


@dataclass(slots=True, kw_only=True, eq=False)
class Listener:
    """Receives the events of one sequence on the event loop; a slow reader of a stream sees only the latest.

    ended: set with the last one, whether or not anybody has read it.
    """

    latest: Event | None = None
    failure: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self) -> Event:
        """Return the next event. Raise EngineStopped if none will come."""
        await self.changed.wait()
        self.changed.clear()
        event, self.latest = self.latest, None
        if event is None:
            raise EngineStopped(self.failure or "the engine stopped")
        return event

    def tell(self, event: Event) -> None:
        self.latest = event
        self.changed.set()
        if event.finish_reason is not None:
            self.ended.set()

    def fail(self, message: str) -> None:
        self.failure = message
        self.changed.set()
        self.ended.set()


class InFlight:
    """Counts what is in flight and refuses what would be too much. It belongs to one event loop."""

    def __init__(self, context_length: int) -> None:
        self._max_prompt_tokens = MAX_FULL_PROMPTS_IN_FLIGHT * context_length
        self._prompt_tokens = 0
        self._rids: set[str] = set()
        self._listeners: set[Listener] = set()

    def __contains__(self, rid: str) -> bool:
        return rid in self._rids

    def enter(self, jobs: ListOf[Job]) -> None:
        """Count a request's sequences. Raise RequestError where they cannot be taken."""
        for _, sequence in jobs:
            if sequence.rid in self._rids:
                raise RequestError(f"rid {cut(sequence.rid)} is already in flight")
        tokens = _prompt_tokens(jobs)
        if (
            len(self._rids) + len(jobs) > MAX_SEQUENCES_IN_FLIGHT
            or self._prompt_tokens + tokens > self._max_prompt_tokens
        ):
            raise TooMuchInFlight(
                f"{len(self._rids)} sequences with {self._prompt_tokens} prompt tokens are in flight, and no room "
                f"for {len(jobs)} with {tokens}; wait for some of them"
            )
        self._prompt_tokens += tokens
        for _, sequence in jobs:
            self._rids.add(sequence.rid)
            self._listeners.add(sequence.listener)

    def leave(self, jobs: ListOf[Job]) -> None:
        """Take back what `enter` counted."""
        self._prompt_tokens -= _prompt_tokens(jobs)
        for _, sequence in jobs:
            self._rids.discard(sequence.rid)
            self._listeners.discard(sequence.listener)

    def fail(self, message: str) -> None:
        """Tell everybody that no more events will come."""
        for listener in self._listeners:
            listener.fail(message)


def _prompt_tokens(jobs: ListOf[Job]) -> int:
    """Count each prompt once, however many samples it has."""
    return sum(len(prompt) for prompt in {id(sequence.prompt): sequence.prompt for _, sequence in jobs}.values())
