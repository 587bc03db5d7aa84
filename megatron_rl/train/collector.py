"""Rank 0's side of a step: new weights to the server, a rollout phase, the plan of the train phase."""

import asyncio
import json
import logging
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import Schedule, schedule
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.prompts import PromptStream, read_prompts
from megatron_rl.records import Group, Sample
from megatron_rl.reward.pool import RewardPool
from megatron_rl.rollout.archive import pack_samples, unpack_samples
from megatron_rl.rollout.client import GenerationClient, together
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.rollout.server import EmbeddedServer, start_servers, stop_servers, wait_all_ready
from megatron_rl.train.resilience import StopSignals

log = logging.getLogger(__name__)
T = TypeVar("T")


class Collector:
    """Owns the servers, their clients, the reward pool and the surplus. `close()` ends them all."""

    def __init__(
        self, config: RlConfig, num_ranks: int, num_data_ranks: int, cost: CostModel, signals: StopSignals
    ) -> None:
        """Starts the servers and waits until they serve. ValueError for data that cannot be used."""
        self._config, self._signals, self._cost = config, signals, cost
        self._num_data_ranks = num_data_ranks
        self._budgets = config.phase_budgets(num_ranks)
        self._tokenizer = load_tokenizer(config.model.path)
        prompts = read_prompts(config.data.train)
        self._input_ids = rendered_prompts(
            prompts, self._tokenizer, config.rollout.max_prompt_tokens, config.data.train
        )
        self._stream = PromptStream(prompts, config.seed)
        self.cursor = 0
        self.carried: tuple[Sample, ...] = ()
        self.mean_response_tokens: float | None = None
        self._loop = asyncio.Runner()
        self._servers: list[EmbeddedServer] = []
        self._clients: list[GenerationClient] = []
        self._rewards = RewardPool(config.reward.kind, config.reward.workers, config.reward.timeout_seconds)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        self._sampler = Sampler(self._clients, self._rewards, self._decode, config.rollout, config.seed)

    def state(self) -> tuple[dict[str, Any], bytes]:
        """What a checkpoint keeps: JSON and carried samples. `restore` takes both."""
        state = {"cursor": self.cursor, "mean_response_tokens": self.mean_response_tokens}
        return state, pack_samples(self.carried)

    def restore(self, state: dict[str, Any], carried: bytes) -> None:
        self.cursor, self.mean_response_tokens = state["cursor"], state["mean_response_tokens"]
        self.carried = unpack_samples(carried)

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
        keep = config.algorithm.name == "c3po" and config.budget.under_full == "refill"
        fresh_enough = [
            s for s in self.carried if policy_version - s.response.policy_version <= config.budget.max_staleness
        ]
        num_stale = len(self.carried) - len(fresh_enough)
        cursor = self.cursor
        try:
            if keep:
                missing = sum(self._budgets) - sum(s.response.num_output_tokens for s in fresh_enough)
                waves = config.budget.max_waves
                rollout = self._sampler.fill(self._take, policy_version, missing, self.mean_response_tokens, waves)
            else:
                rollout = self._sampler.sample(self._take(config.rollout.prompts_per_step), policy_version)
            groups = self._loop.run(self._watched(rollout))
        except BaseException:
            self.cursor = cursor
            raise
        rollout_seconds = time.perf_counter() - started
        plan = schedule(
            groups,
            fresh_enough,
            algorithm=config.algorithm.name,
            budgets=self._budgets,
            cut=config.budget.cut,
            keep_surplus=keep,
            policy_version=policy_version,
            # A different permutation every phase, from the run's seed alone.
            seed=config.seed * 1_000_003 + policy_version,
            num_data_ranks=self._num_data_ranks,
            token_cap=config.micro_batch_cap,
            cost=self._cost,
        )
        self.carried = plan.carried
        self._write_rollouts(policy_version, plan)
        metrics = _rollout_metrics(groups, plan)
        if metrics["num_generated_tokens"]:
            self.mean_response_tokens = metrics["response_tokens_mean"]
        metrics |= {
            "num_dropped_stale": num_stale,
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

    def _connect(self) -> None:
        rollout = self._config.rollout
        if not rollout.urls:
            config = self._config
            self._servers = start_servers(config.model.path, config.run_dir, rollout, config.model.dtype)
            self._loop.run(self._watched(wait_all_ready(self._servers, rollout.ready_deadline_seconds)))
        urls = rollout.urls or [server.url for server in self._servers]
        self._clients += [GenerationClient(url) for url in urls]
        for client in self._clients:
            if not self._loop.run(client.is_ready()):
                raise ValueError(f"no generation server is ready at {client.url} (rollout.urls); start it first")

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

    def _write_rollouts(self, policy_version: int, plan: Schedule) -> None:
        """One JSON row per sample that the plan considered: what was sampled, how it scored, what became of it."""
        trained = {s.index: s.num_loss_tokens for step in plan.plan.steps for s in step.selected}
        carried = {sample.id for sample in plan.carried}
        folder = self._config.run_dir / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"step_{policy_version:06d}.jsonl").open("w") as file:
            for index, sample in enumerate(plan.samples):
                response = sample.response
                outcome = "trained" if index in trained else "carried" if sample.id in carried else "dropped"
                row = {
                    "prompt_id": self._stream.take(response.prompt_id, 1)[0][0].id,
                    "position": response.prompt_id,
                    "sample_index": response.sample_index,
                    "prompt": self._tokenizer.decode(response.prompt_ids.tolist()),
                    "response": self._tokenizer.decode(response.output_ids.tolist()),
                    "reward": sample.reward,
                    "reason": sample.reason,
                    "advantage": sample.advantage,
                    "policy_version": response.policy_version,
                    "finish_reason": response.finish_reason,
                    "num_tokens": response.num_output_tokens,
                    "num_loss_tokens": trained.get(index, 0),
                    "outcome": outcome,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rollout_metrics(groups: Sequence[Group], plan: Schedule) -> dict[str, Any]:
    """Of the samples of this phase; of those that it trains where carried ones filled the whole budget."""
    num_fresh = sum(len(group.samples) for group in groups)
    fresh = [sample for group in groups for sample in group.samples] or plan.samples
    lengths = np.array([sample.response.num_output_tokens for sample in fresh])
    rewards = np.array([sample.reward for sample in fresh])
    decided = sum(len({sample.reward for sample in group.samples}) == 1 for group in groups)
    return {
        "reward": float(rewards.mean()),
        "num_prompts": len(groups),
        "num_samples": num_fresh,
        "num_generated_tokens": int(lengths.sum()) if num_fresh else 0,
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_std": float(lengths.std()),
        "truncated_share": sum(sample.response.finish_reason == "length" for sample in fresh) / max(1, len(fresh)),
        "uniform_group_share": decided / max(1, len(groups)),
        "no_answer_share": sum(sample.reason == "no_answer" for sample in fresh) / max(1, len(fresh)),
        "reward_error_share": sum(sample.reason in ("timeout", "error") for sample in fresh) / max(1, len(fresh)),
        "num_carried": len(plan.carried),
        "num_dropped": plan.num_dropped,
        "num_cut_tokens": plan.num_cut_tokens,
        "num_micro_batches": sum(len(step.micro_batches[0]) for step in plan.plan.steps),
    }
