"""Scores the tokens that the policy sampled by a teacher policy, for on-policy distillation (docs/joint.md).

A sequence is one request; servers batch those that come together. Whichever server scores it, the numbers are its own.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.records import Response, Segment
from megatron_rl.rollout.client import gather_all
from megatron_rl.rollout.pool import Counts, ServerPool

_NUM_PER_SLOT = 2  # requests that servers have, for each sequence that they can score at once


class TeacherScorer:
    """Scores responses on the teacher's servers, and counts what that took."""

    def __init__(self, servers: ServerPool) -> None:
        """Score on these servers, which are connected."""
        self._servers = servers
        self._in_flight = asyncio.Semaphore(_NUM_PER_SLOT * servers.num_slots)
        self._num_open, self._since = 0, 0.0
        self._seconds, self._num_tokens = 0.0, 0

    async def scored(self, responses: Sequence[Response]) -> list[Response]:
        """Return the same responses with `teacher_logprobs` in every segment. Raise what `ServerPool.score` does."""
        return await gather_all(map(self._scored, responses))

    def take_metrics(self) -> dict[str, float]:
        """Return metrics of what scoring took since the last call."""
        counts, self._servers.counts = self._servers.counts, Counts()
        seconds, num_tokens, self._seconds, self._num_tokens = self._seconds, self._num_tokens, 0.0, 0
        return {
            "teacher_seconds": seconds,
            "num_teacher_tokens": num_tokens,
            "num_lost_teachers": counts.num_taken_out,
        }

    async def _scored(self, response: Response) -> Response:
        return replace(response, segments=tuple(await gather_all(map(self._segment, response.segments))))

    async def _segment(self, segment: Segment) -> Segment:
        if not segment.num_policy_tokens:
            return replace(segment, teacher_logprobs=np.zeros(0, np.float32))
        count, start = segment.num_output_tokens_up_to(segment.num_policy_tokens), len(segment.prompt_ids)
        tokens = [*segment.prompt_ids.tolist(), *segment.output_ids[:count].tolist()]
        async with self._in_flight:
            self._begin()
            try:
                found = await self._servers.score(tokens, start)
            finally:
                self._end()
        self._num_tokens += len(tokens)
        return replace(segment, teacher_logprobs=found[segment.policy_mask[:count]])

    def _begin(self) -> None:
        if self._num_open == 0:
            self._since = time.perf_counter()
        self._num_open += 1

    def _end(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._seconds += time.perf_counter() - self._since
