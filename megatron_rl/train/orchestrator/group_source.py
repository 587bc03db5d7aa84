"""Gives a phase its scored groups, from generation servers or from a file that was recorded before."""

import asyncio
import gc
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_rl import __version__
from megatron_rl.c3po.budget import ANY, Shortfall, apportion
from megatron_rl.config.agents import AGENT_KEYS
from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, response_decoder
from megatron_rl.data.domains import check_domains
from megatron_rl.data.mixture import PromptStream, load_prompts
from megatron_rl.data.prompt_tokens import PromptTokens
from megatron_rl.data.prompts import Prompt
from megatron_rl.families import load_architecture
from megatron_rl.gateway.sampler import AgentSampler, agent_settings
from megatron_rl.gateway.turn_journal import TurnJournal
from megatron_rl.records import Group, Segment, UnfinishedGroup
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import gather_all
from megatron_rl.rollout.journal import Journal
from megatron_rl.rollout.pool import Counts, ServerPool
from megatron_rl.rollout.provenance import (
    agent_digests,
    function_digests,
    model_settings,
    objective_digests,
    teacher_settings,
)
from megatron_rl.rollout.rollout_file import NO_TEACHER_IN_FILE, limits_of, read_groups
from megatron_rl.rollout.routing import RoutedShape, routed_shape
from megatron_rl.rollout.sampler import Collected, Question, Sampler, fill_in_waves, joined
from megatron_rl.rollout.teacher_scorer import TeacherScorer
from megatron_rl.train.orchestrator.advantages import advantages_of
from megatron_rl.train.orchestrator.commands import Probe
from megatron_rl.train.orchestrator.node_servers import NodeServers
from megatron_rl.train.run.signals import StopSignals, disk_fault
from megatron_rl.train.run.starts import what_differs

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_CANCEL_SECONDS = 5.0  # for abandoned work to end before others read what it leaves

# Keys that say which prompts there are and in which order.
_OF_THE_ORDER = (
    *("seed", "data", "model.path", "rollout.max_prompt_tokens"),
    *("reward.kind", "reward.domains", "reward.parts"),  # which rows need an answer
)

T = TypeVar("T")
Keep = Callable[[Group], bool]


class GroupSource(Protocol):
    """Gives a phase its scored groups, and knows the prompt of each.

    decode: text of output ids.
    """

    decode: Callable[[Sequence[int]], str]

    def groups(
        self, needs: Sequence[Shortfall], policy_version: int, unfinished: Sequence[UnfinishedGroup], keep: Keep
    ) -> Collected:
        """Return the groups that fill the needs of one phase, which are counted down.

        unfinished: what the phase before left. keep: whether a group teaches something. Raises StopRequested when a
        signal came, and WeightsNeeded when no server is left that has the weights: then nothing of the phase is kept,
        and the next call begins where this one did. Raises ValueError when there are too few.
        """

    def prompt_of(self, position: int) -> Prompt:
        """Return the prompt of the groups whose `prompt_id` is `position`."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON. `restore` takes it."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Raise ValueError when it is that of another source or of other prompts."""

    def metrics(self) -> dict[str, Any]:
        """Return counts since the last call."""

    def forget(self, which: Callable[[int], bool]) -> None:
        """Delete what is kept for a resume of the steps for which `which` is true."""

    def close(self) -> None: ...


class RecordedGroups:
    """Gives the groups of a file (rollout/rollout_file.py), in its order, each once."""

    def __init__(self, config: RlConfig, path: Path, signals: StopSignals) -> None:
        """Read the file. Raise ValueError for a file that cannot be used."""
        if config.rollout.router_replay:
            raise ValueError("--rollouts has no routed experts; set rollout.router_replay = false")
        if config.distillation is not None:
            raise ValueError(NO_TEACHER_IN_FILE)
        self._config, self._signals = config, signals
        self._shares = domain_shares(config)
        tokenizer = load_tokenizer(config.model.path)
        architecture = load_architecture(config.model.path)
        self.decode = response_decoder(tokenizer, architecture.eos_token_ids)
        self._digest = _load_prompts(config, tokenizer)[0].digest
        self._groups, self._prompts = read_groups(path, advantages_of(config), limits_of(config.rollout, architecture))
        if config.budget.domains:
            check_domains(self._prompts.values(), config.budget.domains, f"--rollouts {path}")
        self._cursors = dict.fromkeys(self._shares, 0)

    def groups(
        self, needs: Sequence[Shortfall], policy_version: int, unfinished: Sequence[UnfinishedGroup], keep: Keep
    ) -> Collected:
        async def take(domain: str, count: int) -> list[Group]:
            return self._take(domain, count)

        found = asyncio.run(_in_waves(take, needs, keep, self._config, self._shares))
        self._signals.check()
        found.num_generated_tokens = 0
        found.purged += unfinished  # of a run that sampled when it was saved
        return found

    def prompt_of(self, position: int) -> Prompt:
        return self._prompts[position]

    def state(self) -> dict[str, Any]:
        return {"cursor": self._cursors, "from_rollouts": True, "data": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        self._cursors = _restored_cursors(self._config, state, self._shares, self._digest, from_rollouts=True)

    def metrics(self) -> dict[str, Any]:
        return {}

    def forget(self, which: Callable[[int], bool]) -> None:
        pass

    def close(self) -> None:
        pass

    def _take(self, domain: str, count: int) -> list[Group]:
        groups, first = self._groups, self._cursors[domain]
        left = [i for i in range(first, len(groups)) if self._domain_of(groups[i]) == domain]
        if count > len(left):
            of_domain = f" of domain {domain!r}" if domain != ANY else ""
            raise ValueError(
                f"the phase needs {count} more groups{of_domain} and {len(left)} of the {len(groups)} of "
                "--rollouts are left; record more, or lower train.steps or the budget"
            )
        self._cursors[domain] = left[count - 1] + 1
        return [groups[i] for i in left[:count]]

    def _domain_of(self, group: Group) -> str:
        return domain_of(self._prompts[group.prompt_id], self._shares)


class ServerGroups:
    """Gives groups that generation servers sample and the reward workers score.

    Owns the connections to the servers, the workers and the journal of the present phase. `close()` ends them. rewards:
    judges by the configuration's rewards. refill: pushes the weights to servers that came back behind the last push;
    None where they find them on a disk.
    """

    def __init__(
        self,
        config: RlConfig,
        layout: Layout,
        signals: StopSignals,
        servers: NodeServers,
        teachers: NodeServers | None = None,
    ) -> None:
        """Connect to the servers. teachers: what serves the teacher of distillation. Raise ValueError for prompts that
        cannot be used."""
        self._config, self._signals = config, signals
        self._shares = domain_shares(config)
        tokenizer = load_tokenizer(config.model.path)
        architecture = load_architecture(config.model.path)
        self.decode = response_decoder(tokenizer, architecture.eos_token_ids)
        self._stream, self._input_ids = _load_prompts(config, tokenizer)
        # The position of each domain in the one order of prompts.
        self._cursors = dict.fromkeys(self._shares, 0)
        self._longest: Segment | None = None  # of the last phase that kept any
        self._supervisors = [s.supervisor for s in (servers, teachers) if s is not None and s.supervisor is not None]
        self.rewards = Rewards(config.reward, config.run_dir)
        lost = partial(disk_fault, config, "groups of this phase are not kept for a resume")
        kept_in, identity = config.run_dir / "journal", journal_identity(config, layout, self._stream.digest)
        self._journal = Journal(kept_in, identity, lost)
        routed = routed_shape(architecture) if config.rollout.router_replay else None
        self.pool = _pool_of(servers, routed)
        self._teachers = None if teachers is None else _pool_of(teachers, keeps_weights=True)
        self._teacher: TeacherScorer | None = None
        self.refill: Callable[[], None] | None = None
        self._trouble: Exception | None = None  # of `refill`
        self._loop = BackgroundLoop()
        self._turns: TurnJournal | None = None
        self._agents: AgentSampler | None = None
        try:
            self.run(self.pool.connect())
            if self._teachers is not None:
                self.run(self._teachers.connect())
                self._teacher = TeacherScorer(self._teachers)
        except BaseException:
            self.close()
            raise
        # Prompts and libraries stay from here on. A garbage collector that walks through all of them again and again
        # would stop the event loop for a good part of a second each time.
        gc.collect()
        gc.freeze()
        how = (self.pool, self.rewards, self.decode, advantages_of(config), config.rollout, config.seed)
        if not config.rollout.has_agent:
            self._sampler = Sampler(*how, architecture.eos_token_ids, self._journal, teacher=self._teacher)
            return
        self._turns = TurnJournal(kept_in, identity, lost)
        settings = agent_settings(
            config.model.path, architecture, config.run_dir, config.reward.passing_score, config.data
        )
        self._sampler = self._agents = AgentSampler(
            *how, tokenizer, settings, self._journal, self._turns, teacher=self._teacher
        )
        try:
            self.run(self._agents.start())
        except BaseException:
            self.close()
            raise

    def groups(
        self, needs: Sequence[Shortfall], policy_version: int, unfinished: Sequence[UnfinishedGroup], keep: Keep
    ) -> Collected:
        before = dict(self._cursors)
        num_recalled = self._journal.open(policy_version)
        if self._turns is not None:
            self._turns.open(policy_version, {group.prompt_id for group in unfinished})
        if num_recalled:
            log.info("step %d: %d groups of this phase were completed before", policy_version, num_recalled)
        try:
            found = self.run_generating(self._sample(needs, policy_version, unfinished, keep))
        except BaseException:
            self._cursors = before
            raise
        # Only first segments begin with a prompt that is sure to leave room.
        segments = (s for group in found.kept for sample in group.samples for s in sample.response.segments[:1])
        self._longest = max(segments, key=lambda segment: len(segment.output_ids), default=self._longest)
        return found

    def prompt_of(self, position: int) -> Prompt:
        (prompt,), _ = self._stream.take(position, 1)
        return prompt

    def state(self) -> dict[str, Any]:
        return {"cursor": self._cursors, "from_rollouts": False, "data": self._stream.digest}

    def restore(self, state: dict[str, Any]) -> None:
        self._cursors = _restored_cursors(self._config, state, self._shares, self._stream.digest, from_rollouts=False)

    def metrics(self) -> dict[str, Any]:
        counts, self.pool.counts = self.pool.counts, Counts()
        of_agents = self._agents.take_counts() if self._agents is not None else {}
        return of_agents | {
            "num_resent_samples": counts.num_resent,
            "num_lost_servers": counts.num_taken_out,
            "event_loop_lag_seconds": self.pool.lag.take_largest(),
            "reward_wait_seconds": self._sampler.reward_wait.take_seconds(),
            **({} if self._teacher is None else self._teacher.take_metrics()),
        }

    def forget(self, which: Callable[[int], bool]) -> None:
        self._journal.forget(which)
        if self._turns is not None:
            self._turns.forget(which)

    def close(self) -> None:
        if self._agents is not None:
            self._loop.run(self._agents.stop())
        self._loop.run(self.pool.close())
        if self._teachers is not None:
            self._loop.run(self._teachers.close())
        self.rewards.close()
        self._loop.close()
        self._journal.close()
        if self._turns is not None:
            self._turns.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the pool's event loop, which goes on between calls. Raise StopRequested when a signal came:
        `work` is abandoned then."""
        return self._loop.run(self._watched(work))

    def run_generating(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, for which servers generate, as `run` does. A server that comes back meanwhile gets its weights,
        which this thread alone can order. What goes wrong with that is raised here too."""
        doing = self._loop.start(self._watched(work))
        while not wait([doing], timeout=_LOOK_SECONDS).done:
            if self.refill is not None and self._trouble is None and self.pool.returned:
                try:
                    self.refill()
                except Exception as error:  # raised once the work has ended, which is abandoned
                    self._trouble = error
        found = doing.result()
        if self._trouble is not None:
            raise self._trouble
        return found

    def probe(self, num_tokens: int) -> tuple[list[str], Probe]:
        """Ask every serving server for its log-probs of the same tokens. Return the servers' urls, and the probe that
        asks the trainer for its own.

        The tokens are those of a response: two programs in bfloat16 round alike where the model finds a token likely.
        Before the first phase they are those of prompts.
        """
        most = self._config.rollout.max_sequence_tokens - 1
        if self._longest is not None and len(self._longest.output_ids) > 1:
            start = len(self._longest.prompt_ids)
            tokens = [*self._longest.prompt_ids.tolist(), *self._longest.output_ids[:num_tokens].tolist()][:most]
        else:
            start, tokens = 1, self._prompt_tokens(max(2, min(num_tokens, most)))
        found = self.run(self.pool.input_logprobs(tokens))
        logprobs = [one[start - 1 :].tolist() for one in found.values()]
        return list(found), Probe(token_ids=tokens, start=start, logprobs=logprobs)

    def trained_prompts(self) -> set[str]:
        """Return the texts of all prompts that training asks."""
        return {prompt.text for prompt in self._stream.rows}

    def _prompt_tokens(self, count: int) -> list[int]:
        """Return the first tokens of the prompts that come next."""
        tokens: list[int] = []
        position = min(self._cursors.values())
        while len(tokens) < count:
            (prompt,), position = self._stream.take(position, 1)
            tokens += self._input_ids[prompt.id]
        return tokens[:count]

    async def _sample(
        self, needs: Sequence[Shortfall], policy_version: int, unfinished: Sequence[UnfinishedGroup], keep: Keep
    ) -> Collected:
        if self._teachers is not None:
            await self._teachers.look_again()
        if self._config.rollout.partial:
            resumed = [(self._question(group.prompt_id), group) for group in unfinished]
            max_waves = self._config.budget.max_waves
            return await self._sampler.fill_partially(resumed, self._take, policy_version, needs, keep, max_waves)

        async def take(domain: str, count: int) -> list[Group]:
            return await self._sampler.sample(self._take(domain, count), policy_version)

        found = await _in_waves(take, needs, keep, self._config, self._shares)
        found.purged += unfinished  # of a run that was partial when it was saved
        return found

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, but give it up when a signal came or a server was given up for good."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_SECONDS)
                self._signals.check()
                if self._trouble is not None:
                    raise self._trouble
                for supervisor in self._supervisors:
                    supervisor.check()
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_SECONDS)
        return task.result()

    def _take(self, domain: str, count: int) -> list[Question]:
        positions, self._cursors[domain] = self._stream.positions_of(domain, self._cursors[domain], count)
        return [self._question(position) for position in positions]

    def _question(self, position: int) -> Question:
        prompt = self.prompt_of(position)
        return Question(prompt_id=position, prompt=prompt, input_ids=self._input_ids[prompt.id])


def _pool_of(servers: NodeServers, routed: RoutedShape | None = None, keeps_weights: bool = False) -> ServerPool:
    replaced = None if servers.rollout.urls else servers.replace
    return ServerPool(servers.urls, servers.rollout, replaced, routed, servers.key_of, keeps_weights)


def domain_shares(config: RlConfig) -> dict[str, float]:
    """Return the share of the budget of each domain; one share for all where the budget does not tell domains apart."""
    return config.budget.domains or {ANY: 1.0}


def domain_of(prompt: Prompt, shares: Mapping[str, float]) -> str:
    """Return the domain of a prompt, as far as the budget tells domains apart."""
    return ANY if ANY in shares else prompt.domain


async def _in_waves(
    take: Callable[[str, int], Awaitable[list[Group]]],
    needs: Sequence[Shortfall],
    keep: Keep,
    config: RlConfig,
    shares: dict[str, float],
) -> Collected:
    """Fill domains side by side, each in waves of its own: what one brings does not depend on the others."""
    first_waves = apportion(config.rollout.prompts_per_step, shares)
    return joined(
        await gather_all(
            fill_in_waves(
                partial(take, need.domain), max(1, first_waves[need.domain]), need, keep, config.budget.max_waves
            )
            for need in needs
        )
    )


def _load_prompts(config: RlConfig, tokenizer: Any) -> tuple[PromptStream, PromptTokens]:
    # In the run's own folder, which no other process writes to, so that every start but the first finds them.
    stream, input_ids = load_prompts(config, tokenizer, config.run_dir / "prompt_tokens.bin")
    if config.budget.domains:
        stream.check_shares(config.budget.domains)
    return stream, input_ids


def _restored_cursors(
    config: RlConfig, state: dict[str, Any], shares: Mapping[str, float], digest: str, *, from_rollouts: bool
) -> Any:
    if state.get("from_rollouts", False) != from_rollouts:
        raise ValueError(
            "a run that samples and one that trains from --rollouts cannot continue each other: their cursors "
            "count different things; start a new run with model.path set to the checkpoint"
        )
    if state["data"] != digest:
        raise ValueError(
            "the prompts and their order are not those that this run began with, so its cursor and its unfinished "
            f"responses mean other prompts: {what_differs(config, _OF_THE_ORDER, 'a file of data.train')}; put that "
            "back, or start a new run with model.path set to the checkpoint"
        )
    return saved_by_domain(state["cursor"], shares)


def saved_by_domain(saved: Any, shares: Mapping[str, float]) -> dict[str, Any]:
    """Return what a checkpoint has saved for each domain with a share. A checkpoint from before there were domains has
    a bare number, for all. Raise ValueError when the domains are others."""
    found: dict[str, Any] = saved if isinstance(saved, dict) else {ANY: saved}
    if found.keys() != shares.keys():
        raise ValueError(
            "budget.domains was set or taken out since this run began, and prompts are counted by domain with it only; "
            "put it back as it was, or start a new run with model.path set to the checkpoint"
        )
    return found


def journal_identity(config: RlConfig, layout: Layout, data: str) -> str:
    """Return a hash of all that decides what a phase samples and trains, apart from weights and cursor."""
    relevant: Any = {
        "seed": True,
        "model": {"router_dtype", "head_dtype", "fp8", "fp8_recipe"},
        "lora": True,
        "moe": True,
        "optimizer": True,
        "algorithm": True,
        "budget": True,
        "reward": {
            *("kind", "domains", "parts", "correct_part", "passing_score", "code", "judge"),
            *("overlong_buffer_tokens", "overlong_penalty"),
        },
        "rollout": {
            "engine",
            "prompts_per_step",
            "samples_per_prompt",
            "max_response_tokens",
            "temperature",
            "partial",
            "router_replay",
            *(AGENT_KEYS if config.rollout.has_agent else ()),
        },
        "parallel": True,
        "train": {"micro_batch_tokens"},
    }
    values = config.model_dump(mode="json", include=relevant)
    if config.optimizer.schedule != "constant" or config.optimizer.warmup_share is not None:
        values["steps"] = config.train.steps
    # The same path may hold another model by now.
    model = model_settings(config.model.path, config.model.dtype)
    own: dict[str, Any] = {
        **function_digests(config.reward),
        **objective_digests(config.algorithm),
        **agent_digests(config.rollout),
    }
    if config.distillation is not None:
        pace = {"urls", "api_key_variable", "servers", "threads", "max_running_requests", "sglang_arguments"}
        own["distillation"] = config.distillation.model_dump(mode="json", exclude=pace)
        own["teacher"] = teacher_settings(config.distillation)
    everything = [__version__, data, layout.world_size, model, values, own]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
