"""Tests what counts as time in which a phase waits for rewards alone."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.reward.verdict import Verdict
from megatron_rl.rollout.client import Completion
from megatron_rl.rollout.reward_wait import RewardWait
from megatron_rl.rollout.sampler import Question, Sampler


class Phase:
    """Stands in for servers and rewards. Time goes by where they say so. The responses to prompt 1 are there when those
    to prompt 0 are judged, those to further ones when they are aborted."""

    num_slots = 8

    def __init__(self) -> None:
        self.now = 0.0
        self.first_is_judged, self.is_aborted = asyncio.Event(), asyncio.Event()

    async def generate(self, request: Any, *_: Any) -> Completion:
        if request.input_ids == [1]:
            await self.first_is_judged.wait()
        elif request.input_ids != [0]:
            await self.is_aborted.wait()
            return Completion(
                output_ids=np.zeros(0, np.int32), logprobs=np.zeros(0), finish_reason="abort", weight_versions=()
            )
        self.now += 1.0
        return Completion(output_ids=np.array([2]), logprobs=np.zeros(1), finish_reason="stop", weight_versions=("0",))

    async def abort_all(self) -> None:
        self.is_aborted.set()

    async def verdicts(self, prompt: Prompt, attempts: Any) -> list[Verdict]:
        await asyncio.sleep(0)
        self.now += 100.0 if prompt.id == "0" else 10.0
        self.first_is_judged.set()
        return [Verdict(score=1.0, reason="correct", seconds=0.0) for _ in attempts]


def question(number: int) -> Question:
    return Question(
        prompt_id=number, prompt=Prompt(id=str(number), domain="", prompt="", answer=""), input_ids=(number,)
    )


@pytest.mark.parametrize("partial", [False, True])
def test_only_rewards_that_nothing_is_sampled_beside_are_waited_for(partial: bool) -> None:
    async def seconds() -> tuple[float, float]:
        phase = Phase()
        rollout = RolloutSection(
            prompts_per_step=2, samples_per_prompt=2, max_prompt_tokens=4, max_response_tokens=4, partial=partial
        )
        how: Any = (phase, phase, lambda ids: "", lambda responses, rewards: rewards, rollout, 1, (2,))
        sampler = Sampler(*how)
        sampler.reward_wait = RewardWait(lambda: phase.now)
        if partial:
            left = map(question, range(1000))
            needs = [Shortfall(unit="groups", missing=2)]
            await sampler.fill_partially([], lambda _, count: [next(left)], 0, needs, lambda group: True, 9)
        else:
            await sampler.sample([question(0), question(1)], 0)
        assert phase.now == 4 * 1.0 + 100.0 + 10.0
        return sampler.reward_wait.take_seconds(), sampler.reward_wait.take_seconds()

    # The responses to prompt 1 were sampled while those to prompt 0 were judged, and further ones while all were.
    assert asyncio.run(seconds()) == (0.0 if partial else 10.0, 0.0)


def test_what_is_judged_across_a_call_counts_up_to_it() -> None:
    times = SimpleNamespace(now=0.0)
    wait = RewardWait(lambda: times.now)
    with pytest.raises(ValueError), wait.judging():
        times.now = 3.0
        assert wait.take_seconds() == 3.0
        with wait.sampling():
            times.now = 5.0
        times.now = 9.0
        raise ValueError
    times.now = 20.0
    assert wait.take_seconds() == 4.0
