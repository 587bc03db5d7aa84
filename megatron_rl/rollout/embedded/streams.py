"""Sends answers as server-sent events, while they are generated."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.rollout.embedded.answers import error_body
from megatron_rl.rollout.embedded.engine import EngineStopped
from megatron_rl.rollout.embedded.in_flight import Job
from megatron_rl.rollout.embedded.protocol import PromptRequest
from megatron_rl.rollout.embedded.sequence import Event

DONE = b"data: [DONE]\n\n"


class Stream:
    """Follows the sequences of one request: it gives a cumulative answer as a line, whenever one of them has something
    new.

    Only one line waits to be read; whoever reads slowly misses lines in between, and nothing piles up here.
    """

    def __init__(
        self, jobs: Sequence[Job], answer: Callable[[PromptRequest, Event], dict[str, Any]], *, indexed: bool
    ) -> None:
        """Prepare to follow these sequences; `start` begins it. indexed: answers carry the `index` of their sequence,
        as those of a list do."""
        self._jobs, self._answer, self._indexed = jobs, answer, indexed
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._followers: list[asyncio.Task[None]] = []
        self.num_open = len(jobs)  # sequences whose last line was not read yet

    def start(self) -> None:
        self._followers = [asyncio.create_task(self._follow(index)) for index in range(len(self._jobs))]

    async def next(self) -> bytes | None:
        """Return the next line; None after the last one."""
        while self.num_open:
            line = await self._lines.get()
            if line is not None:
                return line
            self.num_open -= 1
        return None

    def close(self) -> None:
        for follower in self._followers:
            follower.cancel()

    async def _follow(self, index: int) -> None:
        prompt, sequence = self._jobs[index]
        finished = False
        while not finished:
            try:
                event = await sequence.listener.next()
                answer, finished = self._answer(prompt, event), event.finish_reason is not None
            except EngineStopped as error:
                answer, finished = error_body(str(error)), True
            if self._indexed:
                answer["index"] = index
            await self._lines.put(_line(answer))
        await self._lines.put(None)


def error_lines(error: Exception) -> bytes:
    """Return the whole rest of a stream that fails: its status has been sent."""
    return _line(error_body(str(error))) + DONE


def _line(answer: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(answer).encode() + b"\n\n"
