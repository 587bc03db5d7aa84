"""Rank 0's side of a step: new weights to the server, a rollout phase, the plan of the train phase."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_rl.c3po.advantage import group_advantages, overlong_penalty
from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import Shortfall
from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import Schedule, schedule
from megatron_rl.config.bailing import load_bailing_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.prompts import PromptStream, read_prompts
from megatron_rl.layout import Layout
from megatron_rl.records import Group, Response, Sample
from megatron_rl.reward.pool import RewardPool
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry
from megatron_rl.rollout.client import GenerationClient, together
from megatron_rl.rollout.routing import routed_shape, supports_routed_experts
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.rollout.server import GenerationServer, start_servers, stop_servers, wait_all_ready
from megatron_rl.train.phase import Phase
from megatron_rl.train.resilience import StopSignals

log = logging.getLogger(__name__)
T = TypeVar("T")


class Collector:
    """Owns the servers, their clients, the reward pool and the surplus. `close()` ends them all."""

    def __init__(self, config: RlConfig, layout: Layout, cost: CostModel, signals: StopSignals, weights: Path) -> None:
        """Starts the servers on the model directory `weights` and waits until they serve. ValueError for data that
        cannot be used."""
        self._config, self._layout, self._signals, self._cost = config, layout, signals, cost
        self._algorithm = chosen_algorithm(config.algorithm)
        self._budgets = config.phase_budgets(layout.world_size)
        self._tokenizer = load_tokenizer(config.model.path)
        prompts = read_prompts(config.data.train)
        self._input_ids = rendered_prompts(
            prompts, self._tokenizer, config.rollout.max_prompt_tokens, config.data.train
        )
        self._stream = PromptStream(prompts, config.seed)
        self.cursor = 0
        self.carried: tuple[Sample, ...] = ()
        self.tokens_per_prompt: float | None = None
        self._loop = asyncio.Runner()
        self._servers: list[GenerationServer] = []
        self._clients: list[GenerationClient] = []
        self._rewards = RewardPool(config.reward.kind, config.reward.workers, config.reward.timeout_seconds)
        try:
            self._connect(weights)
        except BaseException:
            self.close()
            raise
        self._sampler = Sampler(
            self._clients,
            self._rewards,
            self._decode,
            self._advantages,
            config.rollout,
            config.seed,
            routed_shape(load_bailing_config(config.model.path)) if config.rollout.router_replay else None,
        )

    def state(self) -> tuple[dict[str, Any], bytes]:
        """What a checkpoint keeps: JSON and carried samples. `restore` takes both."""
        state = {"cursor": self.cursor, "tokens_per_prompt": self.tokens_per_prompt}
        return state, pack_carry(Carry(samples=self.carried))

    def restore(self, state: dict[str, Any], carried: bytes) -> None:
        self.cursor, self.tokens_per_prompt = state["cursor"], state["tokens_per_prompt"]
        self.carried = unpack_carry(carried).samples

    def update_weights(self, directory: Path, policy_version: int) -> None:
        """Have every server load the weights in `directory` and answer as `policy_version` from now on."""

        version = str(policy_version)
        updates = together(client.update_weights_from_disk(directory, version) for client in self._clients)
        self._loop.run(self._watched(updates))

    def collect(self, policy_version: int) -> tuple[Schedule, dict[str, Any]]:
        """One rollout phase under the token budget, and the plan of the train phase. Returns metrics beside it.

        StopRequested when a signal came: the phase is abandoned and nothing of it is kept.
        """
        config = self._config
        started = time.perf_counter()
        refill = self._algorithm.uses_budget and config.budget.under_full == "refill"
        oldest = policy_version - config.budget.max_staleness
        fresh_enough = [sample for sample in self.carried if sample.response.policy_version >= oldest]
        stale = [sample for sample in self.carried if sample.response.policy_version < oldest]
        if refill:
            missing = sum(self._budgets) - sum(s.response.num_output_tokens for s in fresh_enough)
            shortfall = Shortfall(unit="tokens", missing=missing, per_prompt=self.tokens_per_prompt)
        else:
            shortfall = Shortfall(unit="groups", missing=config.rollout.prompts_per_step, per_prompt=1.0)
        cursor = self.cursor
        try:
            rollout = self._sampler.fill(
                self._take, policy_version, shortfall, self._is_wanted, config.budget.max_waves
            )
            kept, filtered = self._loop.run(self._watched(rollout))
        except BaseException:
            self.cursor = cursor
            raise
        rollout_seconds = time.perf_counter() - started
        wanted = len(kept) if refill else config.rollout.prompts_per_step
        plan = schedule(
            kept[:wanted],
            fresh_enough,
            algorithm=self._algorithm,
            budgets=self._budgets,
            cut=config.budget.cut,
            keep_surplus=refill,
            max_response_tokens=config.rollout.max_response_tokens,
            policy_version=policy_version,
            # A different permutation every phase, from the run's seed alone.
            seed=config.seed * 1_000_003 + policy_version,
            num_data_ranks=self._layout.data,
            token_cap=config.micro_batch_cap,
            cost=self._cost,
            micro_batch_multiple=self._layout.micro_batch_multiple,
        )
        phase = Phase(
            generated=kept + filtered,
            filtered=filtered,
            unneeded=kept[wanted:],
            stale=stale,
            schedule=plan,
        )
        self.carried = plan.carried
        if refill:
            self.tokens_per_prompt = shortfall.per_prompt
        phase.write(
            config.run_dir / "rollouts" / f"step_{policy_version:06d}.jsonl",
            lambda position: self._stream.take(position, 1)[0][0].id,
            self._tokenizer.decode,
        )
        metrics = phase.metrics(sum(self._budgets) if self._algorithm.uses_budget else None, self._cost)
        metrics |= {
            "rollout_seconds": rollout_seconds,
            "generated_tokens_per_second": metrics["num_generated_tokens"] / rollout_seconds,
            "plan_seconds": time.perf_counter() - started - rollout_seconds,
        }
        return plan, metrics

    def close(self) -> None:
        for client in self._clients:
            self._loop.run(client.close())
        stop_servers(self._servers)
        self._rewards.close()
        self._loop.close()

    def _connect(self, weights: Path) -> None:
        rollout = self._config.rollout
        if not rollout.urls:
            config = self._config
            self._servers = start_servers(weights, config.run_dir, rollout, config.model.dtype)
            self._loop.run(self._watched(wait_all_ready(self._servers, rollout.ready_deadline_seconds)))
        urls = rollout.urls or [server.url for server in self._servers]
        self._clients += [GenerationClient(url) for url in urls]
        for client in self._clients:
            if not self._loop.run(client.is_ready()):
                raise ValueError(f"no generation server is ready at {client.url} (rollout.urls); start it first")
            if rollout.router_replay:
                version = self._loop.run(client.version())
                if not supports_routed_experts(version):
                    raise ValueError(
                        f"rollout.router_replay needs SGLang 0.5.22 or later, {client.url} runs {version!r}; update it "
                        "or set rollout.router_replay = false"
                    )

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, but give it up when a signal came or the server died."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.2)
                self._signals.check()
                if not task.done() and self._clients:
                    for server in self._servers:
                        server.check_alive()
        finally:
            task.cancel()
        return task.result()

    def _take(self, count: int) -> list[Question]:
        first = self.cursor
        prompts, self.cursor = self._stream.take(first, count)
        return [
            Question(prompt_id=position, prompt=prompt, input_ids=self._input_ids[prompt.id])
            for position, prompt in enumerate(prompts, start=first)
        ]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _advantages(self, responses: Sequence[Response], rewards: np.ndarray) -> np.ndarray:
        longest, buffer = self._config.rollout.max_response_tokens, self._config.reward.overlong_buffer_tokens
        penalties = [overlong_penalty(response.num_output_tokens, longest, buffer) for response in responses]
        return group_advantages(rewards + penalties, self._algorithm.advantage)

    def _is_wanted(self, group: Group) -> bool:
        """Dynamic sampling drops groups that teach nothing: all right or all wrong."""
        return not self._algorithm.dynamic_sampling or len({sample.reward for sample in group.samples}) > 1
