"""This module simulates a run of synchronous steps on a cluster: rollout, plan, train, push, with the trainer's own
selection and packing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import ANY, PromptYield, Shortfall, fill, selection_order, shortfalls
from megatron_rl.c3po.packing import CostModel, barrier_cost, pack_micro_batches
from megatron_rl.c3po.plan import split_evenly
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import RlConfig, RunConfig
from megatron_rl.simulation.decode import Decoded
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.rollout import Engines, OpenGroup, Rolled, roll_out_phase
from megatron_rl.simulation.workload import Take


class CannotSimulate(ValueError):
    """Says that the simulator does not know a configuration; the message names the part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Holds the seconds of one optimizer step. even: those of its FLOPs, if all ranks were always busy. bubble: those
    of the pipeline's fill and drain. barrier_flops, num_rows: forward FLOPs of the slowest ranks, and micro-batches per
    rank, as packed or estimated."""

    seconds: float
    even: float
    bubble: float
    barrier_flops: float
    num_rows: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Holds the seconds of a step by part, its tokens, and what share of all GPUs' time was idle, by cause.

    host: what GPUs wait for rank 0's processor, by part. waves: those of its rollout phase. trained: its optimizer
    steps.
    """

    rollout_seconds: float
    train_seconds: float
    sync_seconds: float
    switch_seconds: float
    other_seconds: float
    num_generated_tokens: int
    num_loss_tokens: int
    num_carried: int
    host: dict[str, float]
    idle: dict[str, float]
    waves: tuple[Decoded, ...]
    trained: tuple[Trained, ...]

    @property
    def host_seconds(self) -> float:
        return sum(self.host.values())

    @property
    def seconds(self) -> float:
        pauses = self.sync_seconds + self.switch_seconds + self.host_seconds + self.other_seconds
        return self.rollout_seconds + self.train_seconds + pauses


class Cluster:
    """Simulates a configuration on so many GPUs, which `run` takes from step to step.

    The first `num_packed` optimizer steps are packed into micro-batches as the trainer packs them; later ones cost what
    perfectly even ranks would need times the mean ratio of those, since packing 32,768 responses takes seconds.
    """

    def __init__(
        self,
        config: RlConfig,
        cluster: ClusterSection,
        cost: CostModel,
        rates: Rates,
        take: Take,
        prompt_tokens: float,
        num_packed: int | None = 2,
    ) -> None:
        """Set up the simulation. cost: that of a forward pass over a sequence, in FLOPs. take: gives groups.
        prompt_tokens: the length of every prompt.
        num_packed: None packs every step. CannotSimulate for budget.domains."""
        if config.budget.domains:
            raise CannotSimulate("the simulator knows one distribution of lengths: set budget.domains={}")
        self._config, self._cluster, self._cost, self._rates, self._take = config, cluster, cost, rates, take
        self._layout = config.parallel.layout(cluster.training_ranks)
        self._prompt_tokens, self._num_packed = round(prompt_tokens), num_packed
        self._algorithm = chosen_algorithm(config.algorithm)
        self._budgets = config.phase_budgets(cluster.training_ranks)
        self._refill = self._algorithm.uses_budget and config.budget.under_full == "refill"
        per_node = config.rollout.servers_on(cluster.gpus_per_node)
        servers = len(config.rollout.urls) or (cluster.serving_nodes or cluster.nodes) * per_node
        self.engines = Engines(count=servers, slots=config.rollout.max_running_requests, rates=rates)
        self._number = 0
        self._per_prompt = PromptYield()
        self._carried: list[int] = []  # lengths
        self._since: list[int] = []
        self._unfinished: list[OpenGroup] = []
        self._unevenness: list[tuple[float, float]] = []  # FLOPs and micro-batches of a packed step over an even one's

    def run(self, num_steps: int) -> list[Step]:
        """Simulate the next steps."""
        return [self._step() for _ in range(num_steps)]

    def _step(self) -> Step:
        rates = self._rates
        oldest = self._number - self._config.budget.max_staleness
        self._carried = [n for n, since in zip(self._carried, self._since, strict=True) if since >= oldest]
        self._since = [since for since in self._since if since >= oldest]
        rolled = self._roll_out()
        loss_tokens = self._select(rolled.kept)
        trained = tuple(self._train(tokens) for tokens in loss_tokens)
        self._number += 1
        step = Step(
            rollout_seconds=rolled.seconds,
            train_seconds=sum(one.seconds for one in trained),
            sync_seconds=rates.sync_seconds,
            switch_seconds=0.0 if self._cluster.serving_nodes else rates.switch_seconds,
            other_seconds=rates.step_seconds,
            num_generated_tokens=rolled.num_tokens,
            num_loss_tokens=sum(map(sum, loss_tokens)),
            num_carried=len(self._carried),
            host=rates.host_waits(rolled.seconds, rolled.num_tokens, rolled.num_responses),
            idle={},
            waves=tuple(rolled.waves),
            trained=trained,
        )
        step.idle.update(self._idle(step))
        return step

    def _roll_out(self) -> Rolled:
        rollout, budget, filters = self._config.rollout, self._config.budget, self._algorithm.dynamic_sampling
        if self._refill:
            carried = {ANY: sum(self._carried)}
            known = {ANY: self._per_prompt}
            longest = rollout.max_response_tokens
            (need,) = shortfalls(self._budgets, {ANY: 1.0}, carried, known, longest, budget.margin)
        else:
            need = Shortfall(unit="groups", missing=rollout.prompts_per_step)
        rolled = roll_out_phase(self._config, self.engines, self._take, need, self._unfinished, filters)
        self._unfinished = rolled.unfinished
        if self._refill:
            self._per_prompt = need.per_prompt
        return rolled

    def _select(self, groups: Sequence[np.ndarray]) -> Sequence[Sequence[int]]:
        """Return the loss tokens of the responses of every optimizer step. What is left over is carried."""
        if not self._refill:
            groups = groups[: self._config.rollout.prompts_per_step]
        seed = self._config.seed * 1_000_003 + self._number  # the trainer's
        lengths = [*self._carried, *(n for group in groups for n in group.tolist())]
        order = selection_order(len(self._carried), [len(group) for group in groups], seed)
        ordered = [lengths[i] for i in order]
        if not self._algorithm.uses_budget:
            return split_evenly(ordered, len(self._budgets))
        steps, taken = [], 0
        for start, stop, beyond in fill(ordered, self._budgets):
            steps.append(ordered[start:stop])
            if beyond and self._config.budget.cut == "token":
                steps[-1][-1] -= beyond
            taken = stop
        since = dict(enumerate(self._since))
        left = order[taken:] if self._refill else []
        self._carried, self._since = [lengths[i] for i in left], [since.get(i, self._number) for i in left]
        return steps

    def _train(self, loss_tokens: Sequence[int]) -> Trained:
        layout, rates, cap = self._layout, self._rates, self._config.micro_batch_cap
        per_flop = forward_passes(self._config) / (rates.train_flops * (layout.world_size // layout.data))
        tokens = self._prompt_tokens + np.array(loss_tokens, float)
        even_flops = float((self._cost.linear * tokens + self._cost.quadratic * tokens**2).sum()) / layout.data
        even_rows = tokens.sum() / layout.data / cap
        is_packed = self._num_packed is None or len(self._unevenness) < self._num_packed
        if is_packed:
            sequences = tokens.astype(int).tolist()
            multiple = layout.micro_batch_multiple
            packed = pack_micro_batches(sequences, layout.data, cap, self._cost, multiple_of=multiple)
            flops, rows = barrier_cost(packed, sequences, self._cost), float(len(packed[0]))
            self._unevenness.append((flops / even_flops, rows / even_rows))
        else:
            flops, rows = np.mean(self._unevenness, 0) * (even_flops, even_rows)
        work = per_flop * flops + rows * rates.micro_batch_seconds
        bubble = pipeline_bubble(work, layout, rows)
        return Trained(
            seconds=work + bubble + rates.optimizer_seconds,
            even=per_flop * even_flops,
            bubble=bubble,
            barrier_flops=flops,
            num_rows=rows,
        )

    def _idle(self, step: Step) -> dict[str, float]:
        """Return the idle shares of all GPU-seconds of the step, by cause; see docs/simulator.md."""
        serving = self._cluster.serving_nodes / self._cluster.nodes
        serves, trains = (serving, 1.0 - serving) if serving else (1.0, 1.0)
        even, bubble = sum(one.even for one in step.trained), sum(one.bubble for one in step.trained)
        lost = {
            "empty_slots": serves * (step.rollout_seconds - step.num_generated_tokens / self.engines.full_speed),
            "uneven_ranks": trains * (step.train_seconds - even - bubble),
            "pipeline_bubble": trains * bubble,
            "waiting_for_training": serves * step.train_seconds if serving else 0.0,
            "waiting_for_rollout": trains * step.rollout_seconds if serving else 0.0,
            "sync": step.sync_seconds,
            "switch": step.switch_seconds,
            "host": step.host_seconds,
            "other": step.other_seconds,
        }
        return {cause: seconds / step.seconds for cause, seconds in lost.items()}


def pipeline_bubble(work: float, layout: Layout, num_rows: float) -> float:
    """Return the seconds that filling and draining the pipeline adds to so many seconds of work, in `num_rows`
    micro-batches: the share (p - 1) / (v m) of it (Narayanan et al. 2021, arXiv 2104.04473, Section 2.2)."""
    return work * (layout.pipeline - 1) / (layout.virtual_pipeline * max(1.0, num_rows))


def passes_of_training(config: RunConfig) -> float:
    """Count what a token costs in one pass of training, in forward passes. A backward pass is two, for frozen weights
    one (adapters are too few to count), and recomputation is one more. Selective recomputation counts only for the
    experts, as a whole forward pass, since they are most of it."""
    model = config.model
    recomputes = model.recompute == "full" or (model.recompute == "selective" and "moe" in model.recompute_modules)
    return (3.0 if config.lora is None else 2.0) + recomputes


def forward_passes(config: RlConfig) -> float:
    """Count what training a token costs, in forward passes, over all passes over its rollout. To those of training come
    one for the reference's log-probs and one for the trainer's own old ones (for all but the first optimizer step)."""
    algorithm = config.algorithm
    later = 1.0 - 1.0 / algorithm.optimizer_steps_of_phase if algorithm.trains_on_own_old_logprobs else 0.0
    return algorithm.passes_per_rollout * (passes_of_training(config) + bool(algorithm.kl_coefficient) + later)
