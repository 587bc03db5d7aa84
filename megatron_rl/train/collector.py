"""Rank 0's side of a step: a rollout phase, and the plan of the train phase."""

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_rl import __version__
from megatron_rl.c3po.advantage import group_advantages, overlong_penalty
from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import ANY, PromptYield, Shortfall, apportion, shortfalls
from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import PlanRules, Schedule, schedule
from megatron_rl.config.bailing import load_bailing_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts, response_decoder
from megatron_rl.data.mixture import check_domains, load_stream
from megatron_rl.data.prompts import Prompt
from megatron_rl.layout import Layout
from megatron_rl.records import Group, Response, Sample
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import gather_all
from megatron_rl.rollout.journal import Journal
from megatron_rl.rollout.keeper import ServerKeeper
from megatron_rl.rollout.pool import Counts, ServerPool
from megatron_rl.rollout.recorded import read_groups
from megatron_rl.rollout.routing import routed_shape
from megatron_rl.rollout.sampler import Collected, Question, Sampler, fill_in_waves, joined
from megatron_rl.rollout.settings import model_settings
from megatron_rl.train.exchange import Probe
from megatron_rl.train.phase import Phase
from megatron_rl.train.resilience import StopSignals, disk_fault
from megatron_rl.train.serving import NodeServers

log = logging.getLogger(__name__)

_CANCEL_SECONDS = 5.0  # for abandoned work to end before others read what it leaves

T = TypeVar("T")


class Collector:
    """Owns connections to the servers, the reward pool, and what a phase leaves to the next. `close()` ends them."""

    def __init__(
        self, config: RlConfig, layout: Layout, cost: CostModel, signals: StopSignals, source: NodeServers | Path
    ) -> None:
        """source: the servers, or a file of recorded groups (rollout/recorded.py). ValueError for data that cannot be
        used."""
        self._config, self._layout, self._signals, self._cost = config, layout, signals, cost
        self._algorithm = chosen_algorithm(config.algorithm)
        self._budgets = config.phase_budgets(layout.world_size)
        self._refill = self._algorithm.uses_budget and config.budget.under_full == "refill"
        self._shares = config.budget.domains or {ANY: 1.0}
        self._tokenizer = load_tokenizer(config.model.path)
        bailing = load_bailing_config(config.model.path)
        self.decode = response_decoder(self._tokenizer, bailing.eos_token_id)
        self._stream = load_stream(config.data, config.seed)
        self._input_ids = rendered_prompts(
            self._stream.rows, self._tokenizer, config.rollout.max_prompt_tokens, "data.train"
        )
        if config.budget.domains:
            self._stream.check_shares(config.budget.domains)
        # By domain: where it is in the one order of prompts, and what one of its prompts brings.
        self.cursors = dict.fromkeys(self._shares, 0)
        self.per_prompt = dict.fromkeys(self._shares, PromptYield())
        self.carry = Carry()
        self._loop = BackgroundLoop()
        self._keeper: ServerKeeper | None = None
        self.pool: ServerPool | None = None
        self._rewards: Rewards | None = None
        self._journal: Journal | None = None
        self._recorded: tuple[list[Group], dict[int, Prompt]] | None = None
        if isinstance(source, Path):
            if config.rollout.router_replay:
                raise ValueError("--rollouts has no routed experts; set rollout.router_replay = false")
            self._recorded = read_groups(source, self._advantages)
            if config.budget.domains:
                check_domains(self._recorded[1].values(), config.budget.domains, f"--rollouts {source}")
            return
        self._keeper = source.keeper
        self._rewards = Rewards(config.reward)
        routed = routed_shape(bailing) if config.rollout.router_replay else None
        lost = partial(disk_fault, config, "groups of this phase are not kept for a resume")
        self._journal = Journal(config.run_dir / "journal", _identity(config, layout, self._stream.digest), lost)
        replace = self._keeper.replace if self._keeper else None
        self.pool = ServerPool(source.urls, config.rollout, replace, routed, source.key_of)
        try:
            self.run(self.pool.connect())
        except BaseException:
            self.close()
            raise
        self._sampler = Sampler(
            self.pool,
            self._rewards,
            self.decode,
            self._advantages,
            config.rollout,
            config.seed,
            bailing.eos_token_id,
            self._journal,
        )

    def state(self) -> tuple[dict[str, Any], bytes]:
        """What a checkpoint keeps: JSON, and carried samples and unfinished groups. `restore` takes both."""
        state = {
            "cursor": self.cursors,
            "per_prompt": self.per_prompt,
            "from_rollouts": self._recorded is not None,
            "data": self._stream.digest,
        }
        return state, pack_carry(self.carry)

    def restore(self, state: dict[str, Any], carried: bytes) -> None:
        if state.get("from_rollouts", False) != (self._recorded is not None):
            raise ValueError(
                "a run that samples and one that trains from --rollouts cannot continue each other: their cursors "
                "count different things; start a new run with model.path set to the checkpoint"
            )
        if state["data"] != self._stream.digest:
            raise ValueError(
                "the seed, or the prompts, weights or stages under data, are not those that this run began with, so "
                "its cursor and its unfinished responses mean other prompts; put them back, or start a new run with "
                "model.path set to the checkpoint"
            )
        self.cursors = saved_by_domain(state["cursor"], self._shares)
        known = saved_by_domain(state["per_prompt"], self._shares)
        self.per_prompt = {domain: PromptYield(*sums) for domain, sums in known.items()}
        self.carry = unpack_carry(carried)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the pool's event loop, which goes on between calls. StopRequested when a signal came: it is
        abandoned then."""
        return self._loop.run(self._watched(work))

    def probe(self, num_tokens: int) -> tuple[list[str], Probe]:
        """What every serving server makes of the next prompts' tokens: their urls, and the question for the trainer."""
        assert self.pool is not None
        tokens: list[int] = []
        position = min(self.cursors.values())
        while len(tokens) < num_tokens:
            (prompt,), position = self._stream.take(position, 1)
            tokens += self._input_ids[prompt.id]
        tokens = tokens[: max(2, min(num_tokens, self._config.rollout.max_sequence_tokens - 1))]
        found = self.run(self.pool.input_logprobs(tokens))
        return list(found), Probe(token_ids=tokens, logprobs=[one.tolist() for one in found.values()])

    def collect(self, policy_version: int) -> tuple[Schedule, dict[str, Any]]:
        """One rollout phase under the token budget, and the plan of the train phase. Returns metrics beside it.

        StopRequested when a signal came, WeightsNeeded when no server is left that has them: the phase is abandoned
        and nothing of it is kept. Fault when too many responses could not be judged (`Phase.check_rewards`).
        """
        config = self._config
        started = time.perf_counter()
        since = {s.id: step for s, step in zip(self.carry.samples, self.carry.since, strict=True)}
        oldest = policy_version - config.budget.max_staleness
        fresh_enough = [sample for sample in self.carry.samples if since[sample.id] >= oldest]
        stale = [sample for sample in self.carry.samples if since[sample.id] < oldest]
        needs = self._needs(fresh_enough)
        cursors = dict(self.cursors)
        num_recalled = self._journal.open(policy_version) if self._journal is not None else 0
        if num_recalled:
            log.info("step %d: %d groups of this phase were completed before", policy_version + 1, num_recalled)
        try:
            found = self.run(self._rollout(policy_version, needs))
        except BaseException:
            self.cursors = cursors
            raise
        rollout_seconds = time.perf_counter() - started
        wanted = len(found.kept) if self._refill else config.rollout.prompts_per_step
        plan = schedule(
            found.kept[:wanted],
            fresh_enough,
            self._plan_rules(),
            policy_version=policy_version,
            # A different permutation every phase, from the run's seed alone.
            seed=config.seed * 1_000_003 + policy_version,
        )
        phase = Phase(collected=found, unneeded=found.kept[wanted:], stale=stale, schedule=plan)
        self.carry = Carry(
            samples=plan.carried,
            since=tuple(since.get(sample.id, policy_version) for sample in plan.carried),
            unfinished=tuple(found.unfinished),
        )
        if self._refill:
            self.per_prompt = {need.domain: need.per_prompt for need in needs}
        try:
            path = config.run_dir / "rollouts" / f"step_{policy_version:06d}.jsonl"
            phase.write(path, self._prompt_of, self.decode)
        except OSError as error:
            if fault := disk_fault(config, "the responses of this step are not written", error):
                raise fault from error
        phase.check_rewards(config.reward.max_error_share, self._prompt_of, self.decode)
        budget = sum(self._budgets) if self._algorithm.uses_budget else None
        metrics = phase.metrics(budget, self._cost, self._prompt_of)
        metrics |= {
            "rollout_seconds": rollout_seconds,
            "generated_tokens_per_second": metrics["num_generated_tokens"] / rollout_seconds,
            "plan_seconds": time.perf_counter() - started - rollout_seconds,
        }
        if self.pool is not None:
            counts, self.pool.counts = self.pool.counts, Counts()
            metrics |= {"num_resent_samples": counts.num_resent, "num_lost_servers": counts.num_taken_out}
        return plan, metrics

    def forget(self, which: Callable[[int], bool]) -> None:
        """What these steps sampled is not needed any more."""
        if self._journal is not None:
            self._journal.forget(which)

    def close(self) -> None:
        if self.pool is not None:
            self._loop.run(self.pool.close())
        if self._rewards is not None:
            self._rewards.close()
        self._loop.close()
        if self._journal is not None:
            self._journal.close()

    def _needs(self, carried: Sequence[Sample]) -> list[Shortfall]:
        """What a phase lacks beside the carried samples, of each domain."""
        if not self._refill:
            return [Shortfall(unit="groups", missing=self._config.rollout.prompts_per_step)]
        tokens: Counter[str] = Counter()
        for sample in carried:
            tokens[self._domain_of(sample.response.prompt_id)] += sample.response.num_output_tokens
        longest = self._config.rollout.max_response_tokens
        return shortfalls(self._budgets, self._shares, tokens, self.per_prompt, longest, self._config.budget.margin)

    async def _rollout(self, policy_version: int, needs: Sequence[Shortfall]) -> Collected:
        if self._recorded is None and self._config.rollout.partial:
            resumed = [(self._question(group.prompt_id), group) for group in self.carry.unfinished]
            return await self._sampler.fill_partially(
                resumed, self._take, policy_version, needs, self._is_wanted, self._config.budget.max_waves
            )
        found = joined(await gather_all(self._fill(policy_version, need) for need in needs))
        if self._recorded is not None:
            found.num_generated_tokens = 0
        found.purged += self.carry.unfinished  # of a run that was partial when it was saved
        return found

    async def _fill(self, policy_version: int, need: Shortfall) -> Collected:
        """Domains fill side by side, each in waves of its own: what one brings does not depend on the others."""

        async def groups(count: int) -> list[Group]:
            if self._recorded is not None:
                return self._take_recorded(need.domain, count)
            return await self._sampler.sample(self._take(need.domain, count), policy_version)

        first_wave = max(1, apportion(self._config.rollout.prompts_per_step, self._shares)[need.domain])
        return await fill_in_waves(groups, first_wave, need, self._is_wanted, self._config.budget.max_waves)

    def _take_recorded(self, domain: str, count: int) -> list[Group]:
        assert self._recorded is not None
        groups = self._recorded[0]
        first = self.cursors[domain]
        left = [i for i in range(first, len(groups)) if self._domain_of(groups[i].prompt_id) == domain]
        if count > len(left):
            of_domain = f" of domain {domain!r}" if domain != ANY else ""
            raise ValueError(
                f"the phase needs {count} more groups{of_domain} and {len(left)} of the {len(groups)} of "
                "--rollouts are left; record more, or lower train.steps or the budget"
            )
        self.cursors[domain] = left[count - 1] + 1
        return [groups[i] for i in left[:count]]

    def _prompt_of(self, position: int) -> Prompt:
        """The prompt at this position of the stream, or of the recorded file."""
        return self._recorded[1][position] if self._recorded is not None else self._question(position).prompt

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, but give it up when a signal came or a server was given up for good."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.2)
                self._signals.check()
                if self._keeper is not None:
                    self._keeper.check()
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_SECONDS)
        return task.result()

    def _plan_rules(self) -> PlanRules:
        config = self._config
        return PlanRules(
            algorithm=self._algorithm,
            budgets=self._budgets,
            cut=config.budget.cut,
            keep_surplus=self._refill,
            max_response_tokens=config.rollout.max_response_tokens,
            num_data_ranks=self._layout.data,
            token_cap=config.micro_batch_cap,
            cost=self._cost,
            micro_batch_multiple=self._layout.micro_batch_multiple,
            shares=self._shares,
            domain_of=self._domain_of,
        )

    def _domain_of(self, position: int) -> str:
        """Of the prompt there, as far as the budget tells domains apart."""
        return self._prompt_of(position).domain if self._config.budget.domains else ANY

    def _take(self, domain: str, count: int) -> list[Question]:
        positions, self.cursors[domain] = self._stream.positions_of(domain, self.cursors[domain], count)
        return [self._question(position) for position in positions]

    def _question(self, position: int) -> Question:
        (prompt,), _ = self._stream.take(position, 1)
        return Question(prompt_id=position, prompt=prompt, input_ids=self._input_ids[prompt.id])

    def _advantages(self, responses: Sequence[Response], rewards: np.ndarray) -> np.ndarray:
        longest, buffer = self._config.rollout.max_response_tokens, self._config.reward.overlong_buffer_tokens
        penalties = [overlong_penalty(response.num_output_tokens, longest, buffer) for response in responses]
        return group_advantages(rewards + penalties, self._algorithm.advantage)

    def _is_wanted(self, group: Group) -> bool:
        """Dynamic sampling drops groups that teach nothing: all right or all wrong."""
        return not self._algorithm.dynamic_sampling or len({sample.reward for sample in group.samples}) > 1


def saved_by_domain(saved: Any, shares: Mapping[str, float]) -> dict[str, Any]:
    """What a checkpoint has for each domain with a share. One that was written before there were any has a bare number,
    for all. ValueError when the domains are others."""
    found: dict[str, Any] = saved if isinstance(saved, dict) else {ANY: saved}
    if found.keys() != shares.keys():
        raise ValueError(
            "budget.domains was set or taken out since this run began, and prompts are counted by domain with it only; "
            "put it back as it was, or start a new run with model.path set to the checkpoint"
        )
    return found


def _identity(config: RlConfig, layout: Layout, data: str) -> str:
    """Of all that decides what a phase samples and trains, apart from weights and cursor."""
    relevant: Any = {
        "seed": True,
        "moe": True,
        "optimizer": True,
        "algorithm": True,
        "budget": True,
        "reward": {"kind", "domains", "overlong_buffer_tokens", "code", "judge"},
        "rollout": {
            "engine",
            "prompts_per_step",
            "samples_per_prompt",
            "max_response_tokens",
            "temperature",
            "partial",
            "router_replay",
        },
        "parallel": True,
        "train": {"micro_batch_tokens"},
    }
    values = config.model_dump(mode="json", include=relevant)
    if config.optimizer.schedule != "constant" or config.optimizer.warmup_share is not None:
        values["steps"] = config.train.steps
    # The same path may hold another model by now.
    model = model_settings(config.model.path, config.model.dtype)
    everything = [__version__, data, layout.world_size, model, values]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
