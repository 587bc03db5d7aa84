"""The rollout phase: prompts in, scored groups out, until the token budget is filled."""

import asyncio
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.config.schema import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group, Response, Sample
from megatron_rl.reward.pool import RewardPool
from megatron_rl.rollout.client import GenerationClient, ServerError, together
from megatron_rl.rollout.routing import RoutedShape

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as the sampler needs it. `prompt_id` is its position in the run's prompt stream."""

    prompt_id: int
    prompt: Prompt
    input_ids: tuple[int, ...]


def sampling_seed(run_seed: int, prompt_id: int, sample_index: int, retention: int = 0) -> int:
    """A 31-bit seed that depends on these numbers only, so a resumed run samples what the killed one would have."""
    key = f"{run_seed}/{prompt_id}/{sample_index}/{retention}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & 0x7FFF_FFFF


class Sampler:
    """Samples groups from the servers and scores them while others are generated.

    A group goes as one request to the server with the least outstanding tokens. Which one it is does not matter to
    what comes back: the seeds decide.
    """

    def __init__(
        self,
        clients: Sequence[GenerationClient],
        rewards: RewardPool,
        decode: Callable[[Sequence[int]], str],
        advantages: Callable[[Sequence[Response], np.ndarray], np.ndarray],
        rollout: RolloutSection,
        seed: int,
        routed: RoutedShape | None = None,
    ) -> None:
        """advantages: of one group, float64 [K] from its responses and rewards [K]. routed: ask for routed experts."""
        self._clients, self._rewards, self._decode, self._advantages = clients, rewards, decode, advantages
        self._outstanding_tokens = [0] * len(clients)
        # Enough requests to keep every slot busy twice over; each is an open connection, and those are limited.
        slots = rollout.max_running_requests * len(clients)
        self._in_flight = asyncio.Semaphore(max(8, 2 * slots // rollout.samples_per_prompt))
        self._rollout, self._seed, self._routed = rollout, seed, routed

    async def sample(
        self, questions: Sequence[Question], policy_version: int, samples_per_prompt: int | None = None
    ) -> list[Group]:
        """A scored group for every question, in their order. ServerError when the server fails or has other weights."""
        size = samples_per_prompt or self._rollout.samples_per_prompt
        slots = self._rollout.max_running_requests * len(self._clients)
        waves = math.ceil(len(questions) * size / slots)
        timeout = 30.0 + waves * self._rollout.max_response_tokens * self._rollout.token_deadline_seconds
        return await together(self._group(question, policy_version, size, timeout) for question in questions)

    async def fill(
        self,
        take: Callable[[int], list[Question]],
        policy_version: int,
        shortfall: Shortfall,
        keep: Callable[[Group], bool],
        max_waves: int,
    ) -> tuple[list[Group], list[Group]]:
        """Sample in waves until nothing is missing; the groups that `keep` takes, and those that it does not.

        take: gives the next n questions. shortfall: counted down as waves arrive. ValueError after `max_waves` waves.
        """
        kept: list[Group] = []
        filtered: list[Group] = []
        for _ in range(max_waves):
            count = shortfall.more_prompts(first_wave=self._rollout.prompts_per_step)
            if count == 0:
                return kept, filtered
            wave = await self.sample(take(count), policy_version)
            good = [group for group in wave if keep(group)]
            kept += good
            filtered += [group for group in wave if not keep(group)]
            shortfall.add(count, [[s.response.num_output_tokens for s in group.samples] for group in good])
        if shortfall.missing > 0:
            raise ValueError(
                f"the rollout phase still lacks {shortfall.missing:g} {shortfall.unit} after {max_waves} waves "
                f"(budget.max_waves), of {len(kept) + len(filtered)} groups {len(filtered)} had equal rewards and were "
                "filtered out; raise budget.max_waves, lower the budget or choose prompts of fitting difficulty"
            )
        return kept, filtered

    async def _group(self, question: Question, policy_version: int, size: int, timeout_seconds: float) -> Group:
        async with self._in_flight:
            chosen = self._outstanding_tokens.index(min(self._outstanding_tokens))
            client, tokens = self._clients[chosen], size * self._rollout.max_response_tokens
            self._outstanding_tokens[chosen] += tokens
            try:
                generated = await client.generate(
                    question.input_ids,
                    [sampling_seed(self._seed, question.prompt_id, i) for i in range(size)],
                    max_new_tokens=self._rollout.max_response_tokens,
                    temperature=self._rollout.temperature,
                    timeout_seconds=timeout_seconds,
                    return_routed_experts=self._routed,
                )
            finally:
                self._outstanding_tokens[chosen] -= tokens
        prompt_ids = np.array(question.input_ids, dtype=np.int32)
        responses = []
        for index, one in enumerate(generated):
            if one.weight_version != str(policy_version):
                raise ServerError(
                    f"{client.url} answered with weights {one.weight_version!r}, expected {policy_version!r}: "
                    "the last weight update did not arrive"
                )
            responses.append(
                Response(
                    prompt_id=question.prompt_id,
                    sample_index=index,
                    prompt_ids=prompt_ids,
                    output_ids=one.output_ids,
                    rollout_logprobs=one.logprobs,
                    policy_versions=np.full(len(one.output_ids), policy_version, np.int32),
                    finish_reason=one.finish_reason,
                    routed_experts=one.routed_experts,
                )
            )
        texts = [self._decode(response.output_ids.tolist()) for response in responses]
        verdicts = await asyncio.gather(*(self._rewards.score_async(text, question.prompt.answer) for text in texts))
        advantages = self._advantages(responses, np.array([verdict.score for verdict in verdicts]))
        return Group(
            prompt_id=question.prompt_id,
            samples=tuple(
                Sample(response=r, reward=v.score, reason=v.reason, advantage=float(a))
                for r, v, a in zip(responses, verdicts, advantages, strict=True)
            ),
        )
