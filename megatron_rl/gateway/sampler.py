"""Runs the rollout phase where agents answer prompts: each response is what the policy said in one run of an agent."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.config.agents import AgentKeys
from megatron_rl.config.data import PromptSection
from megatron_rl.config.load import secret_variables
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RolloutPhase
from megatron_rl.data.chat import response_decoder
from megatron_rl.errors import Fault
from megatron_rl.families import Architecture, load_architecture
from megatron_rl.gateway.agents import OUTPUT, Agents, Lost
from megatron_rl.gateway.chat_tokens import ChatTokens
from megatron_rl.gateway.gateway import Gateway
from megatron_rl.gateway.parsers import parser_for
from megatron_rl.gateway.policy import Policy
from megatron_rl.gateway.protocol import Order, Outcome, Setup
from megatron_rl.gateway.trajectory import SECONDS, Limits, Seat, Trajectory
from megatron_rl.gateway.turn_journal import Key, TurnJournal
from megatron_rl.records import Group, Response, UnfinishedGroup
from megatron_rl.reward.rewards import Rewards, neutral
from megatron_rl.reward.score import Attempt, Score, of_task, verdict_of
from megatron_rl.reward.verdict import GAVE_UP, Verdict, make_verdict
from megatron_rl.rollout.journal import Journal
from megatron_rl.rollout.pool import Place, ServerPool
from megatron_rl.rollout.sampler import Collected, Question, Sampler, sampling_seed
from megatron_rl.rollout.standalone import no_advantages, serving
from megatron_rl.rollout.teacher_scorer import TeacherScorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FAILED = "failed"  # finish_reason of a trajectory whose agent did
_ALONE_AT_ONCE = 2  # agents in processes of their own
COUNTED = ("failed_agents", "ended_by_limit", "new_segments", "tool_calls", "broken_tool_calls")
_TOLD = 3  # failures that are logged
_LOOK_SECONDS = 0.01

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """Holds what agents need to know of a run beside its rollout section. folder: takes their output. vocab_size: of
    the model. special_tokens, arguments: as data.special_tokens and data.template_arguments."""

    model: str
    vocab_size: int
    end_ids: tuple[int, ...]
    folder: Path
    passing_score: float
    special_tokens: str = "text"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Run:
    """Holds an agent that runs, perhaps over several phases. trajectory: of the present try."""

    key: Key
    began: float
    trajectory: Trajectory
    task: "asyncio.Task[Outcome]" = field(init=False)


class AgentSampler(Sampler):
    """Runs agents and scores what they return. `start()` before the first phase, `stop()` after the last."""

    def __init__(
        self,
        servers: ServerPool,
        rewards: Rewards,
        decode: Callable[[Sequence[int]], str],
        advantages: Callable[[Sequence[Response], np.ndarray], np.ndarray],
        rollout: RolloutSection,
        seed: int,
        tokenizer: "PreTrainedTokenizerBase",
        settings: AgentSettings,
        journal: Journal | None = None,
        turns: TurnJournal | None = None,
        top_p: float = 1.0,
        teacher: TeacherScorer | None = None,
    ) -> None:
        """Prepare to run agents; `start` begins it. turns: takes turns, and has those that a killed phase had. Raise
        ValueError for a parser that is not known."""
        how = (servers, rewards, decode, advantages, rollout, seed)
        super().__init__(*how, settings.end_ids, journal, top_p, teacher)
        self._turns, self._settings = turns, settings
        parser = parser_for(tokenizer, rollout.tool_parser)
        self._chat = ChatTokens(
            tokenizer, parser, settings.end_ids, settings.special_tokens, arguments=settings.arguments
        )
        self._policy = Policy(servers, rollout.temperature, settings.end_ids, top_p)
        self._gateway = Gateway(
            settings.model, settings.vocab_size, rollout.max_sequence_tokens, rollout.temperature, top_p
        )
        self._setup = setup_of(rollout, settings.folder, settings.passing_score)
        self._agents = Agents(self._setup)
        self._few = asyncio.Semaphore(_ALONE_AT_ONCE)
        self._limits = Limits(
            sequence_tokens=rollout.max_sequence_tokens,
            policy_tokens=rollout.max_response_tokens,
            turns=rollout.max_turns,
        )
        self._runs: dict[Key, _Run] = {}
        self._outcomes: dict[Key, tuple[str, Outcome]] = {}
        self._num_failed, self._numbers = 0, count()
        self.counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Start the process of the agents and the gateway. Raise ValueError for an agent that cannot be run."""
        await self._agents.start()
        await self._gateway.start()

    async def stop(self) -> None:
        await self._end_runs(list(self._runs.values()))
        await self._agents.close()
        await self._gateway.close()
        self._chat.close()

    async def sample(self, questions: Sequence[Question], policy_version: int) -> list[Group]:
        self._policy.open(policy_version)
        return await self._or_end(super().sample(questions, policy_version))

    def as_completed(
        self, questions: Sequence[Question], policy_version: int
    ) -> AsyncGenerator[tuple[Question, Group], None]:
        self._policy.open(policy_version)
        return super().as_completed(questions, policy_version)

    async def fill_partially(
        self,
        resumed: Sequence[tuple[Question, UnfinishedGroup]],
        take: Callable[[str, int], list[Question]],
        policy_version: int,
        needs: Sequence[Shortfall],
        keep: Callable[[Group], bool],
        max_waves: int,
    ) -> Collected:
        self._policy.open(policy_version)
        try:
            found = await self._or_end(super().fill_partially(resumed, take, policy_version, needs, keep, max_waves))
        finally:
            self._policy.clock.close()
        purged = {group.prompt_id for group in found.purged}
        await self._end_runs([run for run in self._runs.values() if run.key[0] in purged])
        return found

    async def _or_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of the work. Where it fails no agent is left running; their turns are known when they begin
        again."""
        try:
            return await work
        except BaseException:
            await asyncio.shield(self._end_runs(list(self._runs.values())))
            raise

    def _blank(self, question: Question) -> list[Response]:
        return [
            Response(prompt_id=question.prompt_id, sample_index=index, segments=(), finish_reason="")
            for index in range(self._rollout.samples_per_prompt)
        ]

    def _ended(self, response: Response) -> Response:
        return response

    async def _abort_all(self) -> None:
        self._policy.clock.close()
        await super()._abort_all()

    async def _continue(
        self,
        question: Question,
        response: Response,
        policy_version: int,
        place: Place,
        may_abort: Callable[[], bool] = lambda: False,
    ) -> Response:
        """Return what the agent had the policy say, when it has ended, or when the phase does."""
        key = (response.prompt_id, response.sample_index)
        run = self._runs.get(key) or self._begin(key, question, place)
        try:
            is_done = await self._until_done_or_closed(run)
        except BaseException:
            await self._end_runs([run])
            raise
        if not is_done:
            while run.trajectory.is_sampling:  # the servers are told to give back what they have
                await asyncio.sleep(_LOOK_SECONDS)
            return Response(prompt_id=key[0], sample_index=key[1], segments=run.trajectory.pause(), finish_reason="")
        del self._runs[key]
        return self._finished(run, question)

    async def _until_done_or_closed(self, run: _Run) -> bool:
        """Wait until the agent is done or the phase ends, and tell whether it is done. Raise what is wrong with the
        servers."""
        closed = asyncio.create_task(self._policy.clock.closed.wait())
        failed = asyncio.create_task(self._policy.failed.wait())
        try:
            while not run.task.done():
                left = run.began + self._rollout.agent_seconds - self._policy.clock.seconds
                if left <= 0:
                    run.trajectory.end(SECONDS, "its time is over (rollout.agent_seconds)")
                    run.task.cancel(self._too_long)
                await asyncio.wait(
                    {run.task, closed, failed}, timeout=max(left, 1.0), return_when=asyncio.FIRST_COMPLETED
                )
                if self._policy.failure is not None:
                    raise self._policy.failure
                if closed.done() and not run.task.done():
                    return False
            return True
        finally:
            closed.cancel()
            failed.cancel()

    def _begin(self, key: Key, question: Question, place: Place) -> _Run:
        run = _Run(key, self._policy.clock.seconds, self._trajectory(key, place))
        run.task = asyncio.create_task(self._play(run, question, place))
        self._runs[key] = run
        return run

    async def _play(self, run: _Run, question: Question, place: Place) -> Outcome:
        """Run the agent to its end. Where the process of all agents is lost meanwhile, whichever of them caused it, the
        agent begins again with the same answers in a process that it has for itself."""
        try:
            return await self._played(run, question, self._agents)
        except Lost:
            run.trajectory = self._trajectory(run.key, place)
        async with self._few:
            alone = Agents(self._setup)
            try:
                return await self._played(run, question, alone)
            except Lost:
                return Outcome(id="", error="it has ended the process that agents are started from")
            except ValueError as error:
                raise Fault(f"agents cannot be started any more: {error}") from None
            finally:
                await alone.close()

    async def _played(self, run: _Run, question: Question, agents: Agents) -> Outcome:
        task = {**of_task(question.prompt), "seed": sampling_seed(self._seed, question.prompt_id, 0)}
        name = f"{run.key[0]}-{run.key[1]}-{next(self._numbers)}"
        opened = self._gateway.open(run.trajectory)
        try:
            return await agents.run(Order(id=name, base_url=opened.base_url, api_key=opened.key, task=task))
        finally:
            self._gateway.shut(opened)

    def _trajectory(self, key: Key, place: Place) -> Trajectory:
        turns = self._turns
        return Trajectory(
            Seat(seed=self._seed, prompt_id=key[0], sample_index=key[1]),
            self._limits,
            self._policy,
            self._chat,
            as_sampled=self._rollout.history == "as_sampled",
            recall=lambda digest: turns.turn(key, digest) if turns else None,
            keep=lambda digest, turn: turns.keep(key, digest, turn) if turns else None,
            server=place,
        )

    def _finished(self, run: _Run, question: Question) -> Response:
        trajectory = run.trajectory
        if run.task.cancelled():
            outcome = Outcome(id="", error=self._too_long)
        else:
            outcome = run.task.result()
        is_failure = bool(outcome.error) and not trajectory.ended
        reason = trajectory.ended or (FAILED if is_failure else "stop")
        self.counts["failed_agents"] += is_failure or reason == SECONDS
        self.counts["ended_by_limit"] += bool(trajectory.ended)
        self.counts["new_segments"] += max(0, trajectory.recording.num_segments - 1)
        self.counts += +trajectory.counts
        if outcome.error and reason in (FAILED, SECONDS) and self._num_failed < _TOLD:
            self._num_failed += 1
            where = question.prompt.where or question.prompt.id
            rest = "; further ones are only counted" if self._num_failed == _TOLD else ""
            log.warning("the agent of the row %s failed: %s; %s has more%s", where, outcome.error, self._output, rest)
        self._outcomes[run.key] = (reason, outcome)
        if self._turns is not None:
            self._turns.keep_outcome(run.key, outcome)
        return Response(
            prompt_id=run.key[0],
            sample_index=run.key[1],
            segments=trajectory.recording.segments(),
            finish_reason=reason,
            text=trajectory.last_text,
        )

    def take_counts(self) -> dict[str, int]:
        """Return the counts of agents since the last call, by the name of their metric."""
        counts, self.counts = self.counts, Counter()
        return {f"num_{name}": counts[name] for name in COUNTED}

    @property
    def _too_long(self) -> str:
        return f"not done after {self._rollout.agent_seconds:g} s (rollout.agent_seconds)"

    @property
    def _output(self) -> Path:
        return self._settings.folder / OUTPUT

    async def _verdicts(self, question: Question, responses: Sequence[Response]) -> list[Verdict]:
        """Return the agents' scores, and the reward's verdicts on the last messages of those that gave none."""
        found = [self._own_verdict(response) for response in responses]
        rest = [response for response, verdict in zip(responses, found, strict=True) if verdict is None]
        judged: list[Verdict] = []
        if rest:
            attempts = [
                Attempt(text=r.text or "", finish_reason=r.finish_reason, num_tokens=r.num_policy_tokens) for r in rest
            ]
            judged = await self._rewards.verdicts(question.prompt, attempts)
        others = iter(judged)
        verdicts = [next(others) if verdict is None else verdict for verdict in found]
        for response in responses:
            self._outcomes.pop((response.prompt_id, response.sample_index), None)
        if self._turns is not None:
            self._turns.drop(question.prompt_id)
        return neutral(verdicts) if any(one is not None and one.reason in GAVE_UP for one in found) else verdicts

    def _own_verdict(self, response: Response) -> Verdict | None:
        """Return the agent's verdict on its own run; None where the reward is to judge."""
        key = (response.prompt_id, response.sample_index)
        reason, outcome = self._outcomes.get(key, (response.finish_reason, None))
        if outcome is None and self._turns is not None:
            outcome = self._turns.outcome(key)  # from before a kill
        if outcome is None:
            return make_verdict("error", details="its score is not known any more: the journal of the run is gone")
        if outcome.error and reason in (FAILED, SECONDS):
            return make_verdict("timeout" if reason == SECONDS else "error", details=outcome.error)
        if outcome.score is None:
            return None
        score = Score(outcome.score, outcome.reason, outcome.details, outcome.parts)
        try:
            return verdict_of(score, self._settings.passing_score)
        except ValueError as error:
            return make_verdict("error", details=str(error))

    async def _end_runs(self, runs: Collection[_Run]) -> None:
        for run in runs:
            run.task.cancel()
            self._runs.pop(run.key, None)
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)


def agent_settings(
    model: Path, architecture: Architecture, folder: Path, passing_score: float, prompts: PromptSection
) -> AgentSettings:
    """Return the settings of agents that answer the prompts of a section. model: the directory that is served."""
    return AgentSettings(
        model=str(model),
        vocab_size=architecture.vocab_size,
        end_ids=tuple(architecture.eos_token_ids),
        folder=folder,
        passing_score=passing_score,
        special_tokens=prompts.special_tokens,
        arguments=prompts.template_arguments,
    )


@asynccontextmanager
async def agent_sampling(
    config: RolloutPhase, model: Path, tokenizer: Any, name: str, seed: int
) -> AsyncIterator[AgentSampler]:
    """Yield a sampler of agents, as `sampling` of rollout/standalone.py does of responses."""
    architecture = load_architecture(model)
    decode = response_decoder(tokenizer, architecture.eos_token_ids)
    with Rewards(config.reward, config.run_dir) as rewards:
        variables = secret_variables(config)
        async with serving(model, config.serving.dtype, config.rollout, config.run_dir, name, variables) as servers:
            settings = agent_settings(model, architecture, config.run_dir, config.reward.passing_score, config.data)
            how = (servers, rewards, decode, no_advantages, config.rollout, seed)
            async with started(AgentSampler(*how, tokenizer, settings)) as sampler:
                yield sampler


@asynccontextmanager
async def started(sampler: AgentSampler) -> AsyncIterator[AgentSampler]:
    """Start a sampler, and stop it at the end."""
    try:
        await sampler.start()
        yield sampler
    finally:
        await sampler.stop()


def setup_of(rollout: AgentKeys, folder: Path, passing_score: float) -> Setup:
    """Return how the process of the agents is started. folder: takes the file of their output."""
    return Setup(
        agent=rollout.agent,
        command=rollout.agent_command,
        folder=str(Path.cwd()),
        output=str((folder / OUTPUT).absolute()),
        memory_bytes=rollout.agent_memory_bytes,
        passing_score=passing_score,
    )


async def check_agent(setup: Setup) -> None:
    """Raise ValueError for an agent that cannot be run: its file, function or program."""
    agents = Agents(setup)
    try:
        await agents.start()
    finally:
        await agents.close()
