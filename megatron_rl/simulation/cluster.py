"""A run of synchronous steps on a cluster: rollout, plan, train, push, with the trainer's own selection and packing."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import ANY, Pick, Shortfall, select, selection_order, shortfalls
from megatron_rl.c3po.packing import CostModel, barrier_cost, pack_micro_batches
from megatron_rl.config.schema import ClusterSection, RlConfig
from megatron_rl.simulation.decode import Decoded
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.rollout import Engines, OpenGroup, Rolled, Take, roll_out, roll_out_partially


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of a step by part, its tokens, and what share of all GPUs' time was idle, by cause.

    waves: of its rollout phase. packed: of each optimizer step that was packed into micro-batches, the forward cost of
    the slowest ranks in FLOPs, and micro-batches per rank.
    """

    rollout_seconds: float
    train_seconds: float
    sync_seconds: float
    switch_seconds: float
    other_seconds: float
    num_generated_tokens: int
    num_loss_tokens: int
    num_carried: int
    idle: dict[str, float]
    waves: tuple[Decoded, ...]
    packed: tuple[tuple[float, int], ...]

    @property
    def seconds(self) -> float:
        pauses = self.sync_seconds + self.switch_seconds + self.other_seconds
        return self.rollout_seconds + self.train_seconds + pauses


class Cluster:
    """A configuration on so many GPUs; iterate over it for its steps, which never end.

    The first `num_packed` optimizer steps are packed into micro-batches as the trainer packs them; later ones cost what
    perfectly even ranks would need times the mean ratio of those, since packing 32,768 responses takes a second.
    """

    def __init__(
        self,
        config: RlConfig,
        cluster: ClusterSection,
        cost: CostModel,
        rates: Rates,
        take: Take,
        prompt_tokens: int,
        num_packed: int = 8,
    ) -> None:
        """cost: of a forward pass over a sequence, in FLOPs. take: gives the lengths of groups. prompt_tokens: of every
        prompt."""
        if config.budget.domains:
            raise ValueError("the simulator knows one length distribution; take budget.domains out")
        self._config, self._cluster, self._cost, self._rates, self._take = config, cluster, cost, rates, take
        self._layout = config.parallel.layout(cluster.training_ranks)
        self._prompt_tokens, self._num_packed = prompt_tokens, num_packed
        self._algorithm = chosen_algorithm(config.algorithm)
        self._budgets = config.phase_budgets(cluster.training_ranks)
        self._refill = self._algorithm.uses_budget and config.budget.under_full == "refill"
        servers = len(config.rollout.urls) or (cluster.serving_nodes or cluster.nodes) * config.rollout.num_servers
        self.engines = Engines(count=servers, slots=config.rollout.max_running_requests, rates=rates)
        self._per_prompt: float | None = None
        self._carried: list[int] = []  # lengths
        self._since: list[int] = []
        self._unfinished: list[OpenGroup] = []
        self._unevenness: list[float] = []
        self._rows: list[float] = []

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, itertools.count())

    def _step(self, number: int) -> Step:
        config, rates = self._config, self._rates
        oldest = number - config.budget.max_staleness
        self._carried = [n for n, since in zip(self._carried, self._since, strict=True) if since >= oldest]
        self._since = [since for since in self._since if since >= oldest]
        rolled, need = self._roll_out()
        if self._refill:
            self._per_prompt = need.per_prompt
        picks = self._select(rolled.groups, number)
        self._packed: list[tuple[float, int]] = []
        train = [self._train([pick.num_loss_tokens for pick in step]) for step in picks]
        colocated = not self._cluster.serving_nodes
        step = Step(
            rollout_seconds=rolled.seconds,
            train_seconds=sum(seconds for seconds, _ in train),
            sync_seconds=rates.sync_seconds,
            switch_seconds=rates.switch_seconds if colocated else 0.0,
            other_seconds=rates.step_seconds,
            num_generated_tokens=rolled.num_tokens,
            num_loss_tokens=sum(pick.num_loss_tokens for step in picks for pick in step),
            num_carried=len(self._carried),
            idle={},
            waves=tuple(rolled.waves),
            packed=tuple(self._packed),
        )
        return replace(step, idle=self._idle(step, rolled, sum(even for _, even in train)))

    def _roll_out(self) -> tuple[Rolled, Shortfall]:
        rollout, budget = self._config.rollout, self._config.budget
        if self._refill:
            carried = {ANY: sum(self._carried)}
            (need,) = shortfalls(
                self._budgets, {ANY: 1.0}, carried, {ANY: self._per_prompt}, rollout.max_response_tokens
            )
        else:
            need = Shortfall(unit="groups", missing=rollout.prompts_per_step, per_prompt=1.0)
        if rollout.partial:
            size, retention = rollout.samples_per_prompt, rollout.max_retention
            rolled = roll_out_partially(self.engines, self._take, need, self._unfinished, size, retention)
            self._unfinished = rolled.unfinished
        else:
            rolled = roll_out(self.engines, self._take, need, rollout.prompts_per_step, budget.max_waves)
        return rolled, need

    def _select(self, groups: Sequence[np.ndarray], number: int) -> Sequence[Sequence[Pick]]:
        """The picks of every optimizer step; what is left over is carried."""
        if not self._refill:
            groups = groups[: self._config.rollout.prompts_per_step]
        seed = self._config.seed * 1_000_003 + number  # the trainer's
        lengths = [*self._carried, *(n for group in groups for n in group.tolist())]
        order = selection_order(len(self._carried), [len(group) for group in groups], seed)
        if not self._algorithm.uses_budget:
            picks = [Pick(index=i, num_loss_tokens=lengths[i]) for i in order]
            parts = len(self._budgets)
            return [picks[len(picks) * i // parts : len(picks) * (i + 1) // parts] for i in range(parts)]
        selection = select(lengths, order, self._budgets, self._config.budget.cut)
        since = {i: s for i, s in enumerate(self._since)}
        left = selection.left_over if self._refill else ()
        self._carried, self._since = [lengths[i] for i in left], [since.get(i, number) for i in left]
        return selection.steps

    def _train(self, loss_tokens: Sequence[int]) -> tuple[float, float]:
        """Seconds of an optimizer step, and those of perfectly even ranks."""
        config, layout, rates = self._config, self._layout, self._rates
        sequences = [self._prompt_tokens + n for n in loss_tokens]
        passes = 4.0 if config.model.recompute else 3.0  # backward is two forwards, recomputation one more
        per_flop = passes / (rates.train_flops * (layout.world_size // layout.data))
        tokens = np.array(sequences, float)
        even = per_flop * float((self._cost.linear * tokens + self._cost.quadratic * tokens**2).sum()) / layout.data
        num_rows = tokens.sum() / layout.data / config.micro_batch_cap
        if len(self._unevenness) < self._num_packed:
            packed = pack_micro_batches(
                sequences, layout.data, config.micro_batch_cap, self._cost, multiple_of=layout.micro_batch_multiple
            )
            barrier = barrier_cost(packed, sequences, self._cost)
            self._packed.append((barrier, len(packed[0])))
            self._unevenness.append(per_flop * barrier / even)
            self._rows.append(len(packed[0]) / num_rows)
        uneven, rows = np.mean(self._unevenness), np.mean(self._rows) * num_rows
        return float(even * uneven + rows * rates.micro_batch_seconds + rates.optimizer_seconds), even

    def _idle(self, step: Step, rolled: Rolled, even_seconds: float) -> dict[str, float]:
        """Shares of all GPU-seconds of the step.

        tail: slots without a response, as time that full ones would have saved. uneven: ranks that wait for others at
        the end of a micro-batch, and what micro-batches and the optimizer cost beside FLOPs. training, generating:
        GPUs that only do the other. sync, switch, other: all GPUs.
        """
        serving = self._cluster.serving_nodes / self._cluster.nodes
        both = not serving
        serves, trains = (1.0, 1.0) if both else (serving, 1.0 - serving)
        lost = {
            "tail": serves * (rolled.seconds - rolled.num_tokens / self.engines.full_speed),
            "uneven": trains * (step.train_seconds - even_seconds),
            "training": 0.0 if both else serves * step.train_seconds,
            "generating": 0.0 if both else trains * step.rollout_seconds,
            "sync": step.sync_seconds,
            "switch": step.switch_seconds,
            "other": step.other_seconds,
        }
        return {cause: seconds / step.seconds for cause, seconds in lost.items()}
