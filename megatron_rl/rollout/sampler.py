"""Runs the rollout phase: prompts in, scored groups out, until the token budget is filled.

A phase either samples in waves and waits for every response, which makes it a function of the seed alone, or it is
partial (C3PO++, Ring-1T report, arXiv 2510.18855): it keeps the decoding slots busy, ends when the completed groups
fill the budget, and leaves the rest unfinished for the next phase.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np

from megatron_rl.c3po.budget import ANY, Shortfall, most_lacking
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group, Response, Sample, Segment, UnfinishedGroup
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import Verdict
from megatron_rl.rollout.client import Completion, SampleRequest, ServerError, gather_all
from megatron_rl.rollout.completion_order import in_order_of_completion
from megatron_rl.rollout.journal import Journal
from megatron_rl.rollout.pool import Place, ServerPool
from megatron_rl.rollout.reward_wait import RewardWait
from megatron_rl.rollout.rollout_file import text_of, with_advantages
from megatron_rl.rollout.teacher_scorer import TeacherScorer

_ABORT_AGAIN_SECONDS = 0.25
_LEAST_AT_ONCE = 16  # groups of which some may wait for their rewards
_NUM_PER_SLOT = 2  # requests that servers have, for each response that they can run at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Holds a prompt as the sampler needs it. `prompt_id` is its position in the run's prompt stream."""

    prompt_id: int
    prompt: Prompt
    input_ids: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Collected:
    """Holds what a phase brought.

    kept, filtered: scored groups that `keep` took, and those that it did not.
    unfinished: to be resumed in the next phase. purged: unfinished ones that have been kept for too long.
    num_generated_tokens: sampled in this phase, whatever became of them.
    """

    kept: list[Group] = field(default_factory=list)
    filtered: list[Group] = field(default_factory=list)
    unfinished: list[UnfinishedGroup] = field(default_factory=list)
    purged: list[UnfinishedGroup] = field(default_factory=list)
    num_generated_tokens: int = 0


def joined(parts: Sequence[Collected]) -> Collected:
    """Join what several parts brought."""
    return Collected(
        kept=[group for part in parts for group in part.kept],
        filtered=[group for part in parts for group in part.filtered],
        unfinished=[group for part in parts for group in part.unfinished],
        purged=[group for part in parts for group in part.purged],
        num_generated_tokens=sum(part.num_generated_tokens for part in parts),
    )


def sampling_seed(run_seed: int, prompt_id: int, sample_index: int) -> int:
    """Return a 31-bit seed that depends on these numbers only, so a resumed run samples what the killed one would have.

    A response that is resumed keeps its seed: random numbers belong to positions, so where the weights are still the
    same it goes on as if it had never stopped.
    """
    key = f"{run_seed}/{prompt_id}/{sample_index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & 0x7FFF_FFFF


def requests_in_flight(rollout: RolloutSection, num_servers: int) -> int:
    """Return the most requests that a sampler has open at once."""
    slots = max(1, num_servers) * rollout.max_running_requests
    if rollout.partial:  # the group that fills the last free slot is started whole
        return slots + rollout.samples_per_prompt - 1
    return max(rollout.samples_per_prompt, _NUM_PER_SLOT * slots)


class Sampler:
    """Samples groups from the servers and scores them while others are generated.

    Which server a request goes to does not matter to what comes back: the seeds decide.
    """

    def __init__(
        self,
        servers: ServerPool,
        rewards: Rewards,
        decode: Callable[[Sequence[int]], str],
        advantages: Callable[[Sequence[Response], np.ndarray], np.ndarray],
        rollout: RolloutSection,
        seed: int,
        end_ids: Collection[int],
        journal: Journal | None = None,
        top_p: float = 1.0,
        teacher: TeacherScorer | None = None,
    ) -> None:
        """Sample from these servers. advantages: of one group, float64 [K] from its responses and rewards [K]. journal:
        takes scored groups, and has those that a killed phase had completed. top_p: see `SampleRequest`. teacher:
        scores the tokens of groups while they are judged."""
        self._servers, self._rewards, self.decode, self._advantages = servers, rewards, decode, advantages
        # Enough requests to keep every slot busy twice over; each is an open connection, and those are limited.
        self._in_flight = asyncio.Semaphore(max(rollout.samples_per_prompt, _NUM_PER_SLOT * servers.num_slots))
        self._starting = asyncio.Lock()
        self._rollout, self._seed, self._end_ids, self._journal = rollout, seed, end_ids, journal
        self._top_p, self._teacher = top_p, teacher
        self.reward_wait = RewardWait()

    async def sample(self, questions: Sequence[Question], policy_version: int) -> list[Group]:
        """Return a scored group for every question, in their order. Each response is a request of its own."""
        return await gather_all(self._group(question, policy_version) for question in questions)

    def as_completed(
        self, questions: Sequence[Question], policy_version: int
    ) -> AsyncGenerator[tuple[Question, Group], None]:
        """Yield a scored group for every question, each as it comes; so many at a time as keep the servers busy."""

        async def one(question: Question) -> tuple[Question, Group]:
            return question, await self._group(question, policy_version)

        most = max(_LEAST_AT_ONCE, 4 * self._servers.num_slots // self._rollout.samples_per_prompt)
        return in_order_of_completion(map(one, questions), most)

    async def fill_partially(
        self,
        resumed: Sequence[tuple[Question, UnfinishedGroup]],
        take: Callable[[str, int], list[Question]],
        policy_version: int,
        needs: Sequence[Shortfall],
        keep: Callable[[Group], bool],
        max_waves: int,
    ) -> Collected:
        """Sample until nothing is missing, then stop what still runs (C3PO++).

        resumed: unfinished groups of the last phase; they go first. take: gives the next n questions of a domain.
        needs: of every domain, or one for all; counted down as groups are completed. A free slot goes to a domain that
        lacks something. Raises ValueError when `max_waves` times as many prompts as should do have brought too little.
        """
        if all(need.missing <= 0 for need in needs):
            return Collected(unfinished=[group for _, group in resumed])
        phase = _PartialPhase(self, policy_version, needs, keep)
        size = self._rollout.samples_per_prompt
        wave = sum(
            math.ceil(max(0.0, need.missing) / (need.per_prompt.mean if need.per_prompt.is_known else math.inf))
            for need in needs
        )
        limit, num_started = max_waves * max(self._rollout.prompts_per_step, wave), 0
        try:
            for question, group in resumed:
                phase.start(question, [self._ended(response) for response in group.responses], group.retention)
                await asyncio.sleep(0)
            while lacking := [need for need in needs if need.missing > 0]:
                count = lacking[0].prompts_to_start(phase.num_running, self._servers.num_slots, size)
                if count == 0 or num_started < limit:
                    num_started += count
                    for _ in range(count):
                        if not (lacking := [need for need in needs if need.missing > 0]):
                            break  # what has come meanwhile is enough
                        (question,) = take(most_lacking(lacking, phase.num_open).domain, 1)
                        phase.start(question, self._blank(question), 0)
                        await asyncio.sleep(0)  # the event loop reads what has come before it sends what is asked here
                if lacking and not await phase.advance():
                    raise _never_filled(lacking[0], phase.found, f"{num_started} prompts")
            await phase.stop(self._abort_all)
        finally:
            phase.cancel()
        return phase.ended(self._rollout.max_retention)

    async def _group(self, question: Question, policy_version: int) -> Group:
        done = self._recall(question)
        if done is not None:
            return done
        async with self._starting:
            await asyncio.sleep(0)  # the event loop reads what has come before it sends what another group asks
        place = Place()

        async def in_turn(response: Response) -> Response:
            async with self._in_flight:
                with self.reward_wait.sampling():
                    whole = await self._continue(question, response, policy_version, place)
            return await self._with_text(whole)

        return await self._score(question, await gather_all(map(in_turn, self._blank(question))))

    def _blank(self, question: Question) -> list[Response]:
        """Return the responses of a group before anything is sampled."""
        return _blank(question, self._rollout.samples_per_prompt)

    async def _abort_all(self) -> None:
        """Have what runs come back now, as it is."""
        await self._servers.abort_all()

    async def _continue(
        self,
        question: Question,
        response: Response,
        policy_version: int,
        place: Place,
        may_abort: Callable[[], bool] = lambda: False,
    ) -> Response:
        """Return the same response, sampled on from where it is. place, may_abort: see `ServerPool.generate`."""
        (segment,) = response.segments
        generated = await self._servers.generate(
            SampleRequest(
                input_ids=[*segment.prompt_ids.tolist(), *segment.output_ids.tolist()],
                seed=sampling_seed(self._seed, response.prompt_id, response.sample_index),
                max_new_tokens=self._rollout.max_response_tokens - response.num_policy_tokens,
                top_p=self._top_p,
            ),
            self._rollout.temperature,
            may_abort,
            place,
        )
        return self._ended(_extended(response, generated, policy_version))

    def _ended(self, response: Response) -> Response:
        """Return the response as finished where nothing may follow: SGLang calls a response aborted even if that was
        its last token. Otherwise return it as it waits for the next phase."""
        if response.finish_reason:
            return response
        (segment,) = response.segments
        if segment.num_policy_tokens >= self._rollout.max_response_tokens:
            return replace(response, finish_reason="length")
        if segment.num_policy_tokens and int(segment.output_ids[-1]) in self._end_ids:
            return replace(response, finish_reason="stop")
        # All of an unfinished one goes through the weights of the next phase again, and has their experts then.
        return replace(response, segments=(replace(segment, routed_experts=None),))

    async def _with_text(self, response: Response) -> Response:
        """Return the same response, decoded once it has ended, and in a thread: tokenizers let others run meanwhile."""
        if not response.finish_reason or response.text is not None:
            return response
        return replace(response, text=await asyncio.to_thread(text_of, response, self.decode))

    async def _score(self, question: Question, responses: Sequence[Response]) -> Group:
        # Decoded before, but for those that an older limit had not ended and a checkpoint kept.
        responses = await gather_all(map(self._with_text, responses))
        work: list[Coroutine[Any, Any, Any]] = [self._judged(question, responses), self._taught(responses)]
        verdicts, responses = await gather_all(work)
        advantages = self._advantages(responses, np.array([verdict.score for verdict in verdicts]))
        group = Group(
            prompt_id=question.prompt_id,
            samples=tuple(
                Sample(
                    response=r,
                    reward=v.score,
                    reason=v.reason,
                    details=v.details,
                    parts=v.parts,
                    advantage=float(a),
                )
                for r, v, a in zip(responses, verdicts, advantages, strict=True)
            ),
        )
        if self._journal is not None:
            await self._journal.append(group)
        return group

    async def _judged(self, question: Question, responses: Sequence[Response]) -> list[Verdict]:
        with self.reward_wait.judging():
            return await self._verdicts(question, responses)

    async def _verdicts(self, question: Question, responses: Sequence[Response]) -> list[Verdict]:
        attempts = [
            Attempt(text=r.text or "", finish_reason=r.finish_reason, num_tokens=r.num_policy_tokens) for r in responses
        ]
        return await self._rewards.verdicts(question.prompt, attempts)

    async def _taught(self, responses: Sequence[Response]) -> Sequence[Response]:
        return responses if self._teacher is None else await self._teacher.scored(responses)

    def _recall(self, question: Question) -> Group | None:
        """Return the group of this phase that was completed before the run was killed."""
        found = self._journal.find(question.prompt_id) if self._journal is not None else None
        return None if found is None else with_advantages(found, self._advantages)


async def fill_in_waves(
    sample: Callable[[int], Awaitable[list[Group]]],
    first_wave: int,
    shortfall: Shortfall,
    keep: Callable[[Group], bool],
    max_waves: int,
) -> Collected:
    """Sample groups until nothing is missing. sample: gives the groups of the next n prompts. Raise ValueError after
    `max_waves`."""
    found = Collected()
    for _ in range(max_waves):
        count = shortfall.more_prompts(first_wave=first_wave)
        if count == 0:
            return found
        wave = await sample(count)
        kept = [keep(group) for group in wave]
        good = list(compress(wave, kept))
        found.kept += good
        found.filtered += [group for group, is_kept in zip(wave, kept, strict=True) if not is_kept]
        found.num_generated_tokens += sum(map(_num_tokens, wave))
        shortfall.add(count, [[s.response.num_policy_tokens for s in group.samples] for group in good])
    if shortfall.missing > 0:
        raise _never_filled(shortfall, found, f"{max_waves} waves")
    return found


@dataclass(slots=True)
class _Open:
    question: Question
    responses: list[Response]
    retention: int
    place: Place


class _PartialPhase:
    """Holds the groups in flight of one partial phase, and what has come of it."""

    def __init__(
        self, sampler: Sampler, policy_version: int, needs: Sequence[Shortfall], keep: Callable[[Group], bool]
    ) -> None:
        self._sampler, self._version, self._needs, self._keep = sampler, policy_version, needs, keep
        self._open: dict[int, _Open] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Ended and not looked at yet. Waiting for the first of all tasks would go through all of them for each.
        self._ended: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()
        self._stopping = False
        self.num_running = 0  # responses
        self.num_open: Counter[str] = Counter()  # groups, by the domain of their need
        self.found = Collected()

    def start(self, question: Question, responses: Sequence[Response], retention: int) -> None:
        done = self._sampler._recall(question)
        self.num_open[self._need(question).domain] += 1
        if done is not None:
            now = sum(int((s.response.policy_versions == self._version).sum()) for s in done.samples)
            self.found.num_generated_tokens += now
            self._spawn(self._add(question, done))
            return
        # Slots are all taken here, and no more: a response goes where one is free before it goes to its group.
        place = Place(most=self._sampler._rollout.max_running_requests)
        self._open[question.prompt_id] = _Open(question, list(responses), retention, place)
        left = [response for response in responses if not response.finish_reason]
        for response in left:
            self.num_running += 1
            self._spawn(self._run(response, place))
        if not left:  # a limit was lowered since they were sampled
            self._spawn(self._complete(question.prompt_id))

    async def advance(self) -> bool:
        """Wait until something has ended; False when nothing runs."""
        if not self._tasks:
            return False
        await self._look_at_one()
        while not self._ended.empty():
            await self._look_at_one()
        return True

    async def stop(self, abort_all: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have the servers end what runs, until all of it has come back."""
        self._stopping = True
        while self._tasks:
            if self.num_running:
                # This is repeated, since a request may reach its server after the first abort.
                await abort_all()
            try:
                async with asyncio.timeout(_ABORT_AGAIN_SECONDS) as again:
                    while self._tasks:
                        await self._look_at_one()
            except TimeoutError:
                if not again.expired():
                    raise

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
            # One failure is raised; the others of a lost server say the same, and asyncio would print each.
            task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())

    def ended(self, max_retention: int) -> Collected:
        for prompt_id, group in sorted(self._open.items()):
            left = UnfinishedGroup(prompt_id=prompt_id, responses=tuple(group.responses), retention=group.retention + 1)
            (self.found.unfinished if left.retention <= max_retention else self.found.purged).append(left)
        return self.found

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended.put_nowait)

    async def _look_at_one(self) -> None:
        """Wait until a task has ended. Raise what it raised."""
        task = await self._ended.get()
        self._tasks.discard(task)
        task.result()

    async def _run(self, response: Response, place: Place) -> None:
        try:
            question = self._open[response.prompt_id].question
            with self._sampler.reward_wait.sampling():
                longer = await self._sampler._continue(question, response, self._version, place, lambda: self._stopping)
        except ServerError:
            if not self._stopping:
                raise
            return  # what its server had sampled is lost; it goes on in the next phase from where it was
        finally:
            self.num_running -= 1
        self.found.num_generated_tokens += longer.num_policy_tokens - response.num_policy_tokens
        longer = await self._sampler._with_text(longer)
        group = self._open[response.prompt_id]
        group.responses[response.sample_index] = longer
        if all(one.finish_reason for one in group.responses):
            await self._complete(response.prompt_id)

    async def _complete(self, prompt_id: int) -> None:
        group = self._open[prompt_id]
        scored = await self._sampler._score(group.question, group.responses)
        del self._open[prompt_id]
        await self._add(group.question, scored)

    async def _add(self, question: Question, scored: Group) -> None:
        good = self._keep(scored)
        (self.found.kept if good else self.found.filtered).append(scored)
        need = self._need(question)
        self.num_open[need.domain] -= 1
        need.add(1, [[s.response.num_policy_tokens for s in scored.samples]] if good else [])

    def _need(self, question: Question) -> Shortfall:
        return next(need for need in self._needs if need.domain in (ANY, question.prompt.domain))


def _blank(question: Question, size: int) -> list[Response]:
    nothing = Segment(
        prompt_ids=np.array(question.input_ids, np.int32),
        output_ids=np.zeros(0, np.int32),
        rollout_logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
    )
    return [
        Response(prompt_id=question.prompt_id, sample_index=index, segments=(nothing,), finish_reason="")
        for index in range(size)
    ]


def _extended(response: Response, more: Completion, policy_version: int) -> Response:
    (segment,) = response.segments
    longer = replace(
        segment,
        output_ids=np.concatenate([segment.output_ids, more.output_ids]),
        rollout_logprobs=np.concatenate([segment.rollout_logprobs, more.logprobs]),
        policy_versions=np.concatenate(
            [segment.policy_versions, np.full(len(more.output_ids), policy_version, np.int32)]
        ),
        # The experts of the whole sequence: earlier tokens went through the present weights too.
        routed_experts=more.routed_experts if len(more.output_ids) else segment.routed_experts,
    )
    finish_reason = "" if more.finish_reason == "abort" else more.finish_reason
    return replace(response, segments=(longer,), finish_reason=finish_reason)


def _num_tokens(group: Group) -> int:
    return sum(sample.response.num_policy_tokens for sample in group.samples)


def _never_filled(shortfall: Shortfall, found: Collected, after: str) -> ValueError:
    reasons = Counter(sample.reason for group in found.filtered for sample in group.samples)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    if found.kept and not any(map(_num_tokens, found.kept)):
        return ValueError(
            f"no response of {len(found.kept)} groups has a token that the policy sampled, so the phase has nothing to "
            "train: the agents do not ask the policy, which answers at the address that they are given "
            "(docs/agents.md; `megatron-rl rollout` tries them)"
        )
    return ValueError(
        f"the rollout phase still lacks {shortfall.missing:g} {shortfall.unit}"
        + (f" of domain {shortfall.domain!r}" if shortfall.domain != ANY else "")
        + f" after {after} (budget.max_waves), of "
        f"{len(found.kept) + len(found.filtered)} groups {len(found.filtered)} had equal rewards and were filtered "
        f"out{f' (their responses: {told})' if told else ''}; raise budget.max_waves, lower the budget or choose "
        "prompts of fitting difficulty"
    )
