"""Asks an endpoint for responses in place of a checkpoint: text and verdict, without token ids and log-probs.

A prompt is sent as a chat message, once for each of its responses. The verdict is that of the content; what a reasoning
model thought before it is kept beside it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from megatron_rl.config.endpoints import TeacherSection
from megatron_rl.config.schema import SamplingConfig
from megatron_rl.data.messages import with_system
from megatron_rl.data.prompts import Prompt
from megatron_rl.endpoint import Endpoint, EndpointError, Reply
from megatron_rl.errors import Fault
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import GAVE_UP, Verdict
from megatron_rl.rollout.append_log import Finished
from megatron_rl.rollout.client import gather_all
from megatron_rl.rollout.rollout_file import answer_columns, asked_columns
from megatron_rl.rollout.sampler import sampling_seed

log = logging.getLogger(__name__)

# Fewer failures are bad luck in a small run.
_MIN_FAILED = 8
_TELL_EVERY_SECONDS = 30.0


class Teacher:
    """Asks for `rollout.samples_per_prompt` responses to each prompt, and has them judged."""

    def __init__(self, config: SamplingConfig, section: TeacherSection, endpoint: Endpoint, rewards: Rewards) -> None:
        self._section, self._endpoint, self._rewards = section, endpoint, rewards
        self._kind_of = config.reward.kind_of
        self._seed, self._size = config.seed, config.rollout.samples_per_prompt
        self._options = _options(config, section)
        self._num_responses = 0
        self._failed: list[str] = []

    @property
    def num_failed(self) -> int:
        return len(self._failed)

    async def as_completed(
        self, questions: Sequence[tuple[int, Prompt]], num_before: int
    ) -> AsyncGenerator[Finished, None]:
        """Yield the rows of every prompt, as it completes. questions: (position in the run's order, prompt).
        num_before: prompts that an earlier call got answered.

        A prompt of which a response failed has no rows. Raises Fault when more than `teacher.max_failure_share` of all,
        answered earlier or asked now, failed.
        """
        waiting, running, num_answered = iter(questions), set[asyncio.Task[Finished]](), num_before
        try:
            while True:
                # One response of each prompt fills every place; the endpoint's queue gives the first prompts theirs
                # first, so few are half done when the run is killed.
                while len(running) < self._section.concurrent and (question := next(waiting, None)):
                    running.add(asyncio.create_task(self._finished(*question)))
                if not running:
                    break
                done, running = await asyncio.wait(
                    running, timeout=_TELL_EVERY_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    log.info("waiting for %d prompts; %d responses so far", len(running), self._num_responses)
                ended = [
                    (task, task.exception()) for task in done
                ]  # all looked at, or asyncio prints those that are not
                for task, error in ended:
                    if error is None:
                        num_answered += 1
                        yield task.result()
                    elif isinstance(error, EndpointError):
                        self._failed.append(str(error))
                        self._check(num_answered + len(self._failed), _MIN_FAILED)
                    else:
                        raise error
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        self._check(num_before + len(questions), 1)
        if self._failed:
            log.warning(
                "%d of %d prompts got no answer (the last: %s); --resume asks them again",
                len(self._failed),
                len(questions),
                self._failed[-1],
            )

    async def _finished(self, position: int, prompt: Prompt) -> Finished:
        replies = await gather_all(self._reply(position, index, prompt) for index in range(self._size))
        attempts = [Attempt(text=r.content, finish_reason=r.finish_reason, num_tokens=r.num_tokens) for r in replies]
        verdicts = await self._rewards.verdicts(prompt, attempts)
        rows = [self._row(position, i, prompt, *one) for i, one in enumerate(zip(replies, verdicts, strict=True))]
        return Finished(
            lines="".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            num_tokens=sum(row["num_tokens"] for row in rows),
            reward=sum(row["reward"] for row in rows) / len(rows),
            error_share=sum(row["reason"] in GAVE_UP for row in rows) / len(rows),
        )

    async def _reply(self, position: int, index: int, prompt: Prompt) -> Reply:
        asked = prompt.conversation
        messages = [one.as_dict() for one in with_system(asked.messages, self._section.system)]
        seed = {"seed": sampling_seed(self._seed, position, index)} if self._section.send_seed else {}
        tools = {"tools": json.loads(asked.tools)} if asked.tools else {}
        async with self._endpoint.room():
            reply = await self._endpoint.ask(messages, self._options | seed | tools)
        self._num_responses += 1
        return reply

    def _row(self, position: int, index: int, prompt: Prompt, reply: Reply, verdict: Verdict) -> dict[str, Any]:
        return {
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "position": position,
            "sample_index": index,
            "prompt": prompt.prompt,
            **asked_columns(prompt),
            "response": reply.content,
            "reasoning": reply.reasoning,
            **answer_columns(prompt, self._kind_of(prompt.domain), reply.content),
            "reward": verdict.score,
            "reason": verdict.reason,
            "details": verdict.details,
            **({"parts": dict(verdict.parts)} if verdict.parts else {}),
            "finish_reason": reply.finish_reason,
            "num_tokens": reply.num_tokens,
            "model": self._section.model,
        }

    def _check(self, num_ended: int, min_failed: int) -> None:
        """Raise Fault when too many of so many prompts failed."""
        failed, share = self._failed, self._section.max_failure_share
        if len(failed) >= min_failed and len(failed) > share * num_ended:
            raise Fault(
                f"{len(failed)} of {num_ended} prompts got no answer from {self._section.model} at "
                f"{self._section.url}, a greater share than teacher.max_failure_share = {share:g}. The last: "
                f"{failed[-1]}. Mend that (teacher.concurrent may be too high, teacher.timeout_seconds too low) and "
                "go on with --resume; the other responses are kept"
            )


def _options(config: SamplingConfig, section: TeacherSection) -> dict[str, Any]:
    """Return what every request says beside model, messages and seed."""
    options = {
        "temperature": config.rollout.temperature,
        "top_p": section.top_p,
        "max_tokens": config.rollout.max_response_tokens,
    }
    if "max_completion_tokens" in section.extra:
        del options["max_tokens"]
    return options | section.extra
