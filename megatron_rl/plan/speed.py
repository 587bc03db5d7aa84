"""This module predicts how long a step would take under some layout, for the search of `plan --suggest`.

Generation and the passes of training are the simulator's. Some rates that the simulator reads as one number depend on
the layout, so they are counted here: an engine of g GPUs by the bytes that it reads, and the bytes that ranks exchange
by the speed of the links between them. The speeds are ASSUMED, those of an H800 as in
examples/ring_lite/rates/h800_assumed.toml; a file of rates (`--rates`, cluster.rates) replaces what it has.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_rl.c3po.budget import ANY, PromptYield, Shortfall, shortfalls
from megatron_rl.c3po.packing import cost_model
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import RlConfig, RunConfig, SftConfig
from megatron_rl.families import Architecture
from megatron_rl.memory import ITEM_BYTES, OPTIMIZER_BYTES, trained_parameters
from megatron_rl.simulation.cluster import forward_passes, passes_of_training, pipeline_bubble
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.rollout import Engines, OpenGroup, roll_out_phase
from megatron_rl.simulation.workload import Workload, assumed

# Bytes/s: of a GPU's memory at half of nominal, between the GPUs of a node, between nodes, and to the host.
_MEMORY, _NODE_LINK, _NETWORK, _HOST_LINK = 1.7e12, 1.5e11, 2.0e10, 2.0e10
# An iteration of an engine takes these: launches, and a reduction for each doubling of its GPUs.
_LAUNCH_SECONDS, _REDUCE_SECONDS = 3e-3, 1e-3
_TRAIN_FLOPS, _MICRO_BATCH_SECONDS, _OPTIMIZER_SECONDS, _SYNC_SECONDS, _SWITCH_SECONDS = 3e14, 0.05, 1.0, 15.0, 20.0
# Passes in which ranks exchange a layer's tokens: forward, backward, and the recomputed one.
_PASSES, _RECOMPUTED = 2, 1
_PHASES = 3  # until it is known what a prompt brings
_PARTIAL_PHASES = 8  # of C3PO++; the second half counts, which goes on with what phases before left unfinished


@dataclass(frozen=True, kw_only=True)
class SpeedModel:
    """Predicts the seconds of one configuration on one cluster, under different layouts. rates: those of the file, if
    there is one."""

    config: RunConfig
    architecture: Architecture
    cluster: ClusterSection
    rates: Rates | None = None

    def rollout_seconds(self, engine_gpus: int, slots: int) -> float:
        """Predict a rollout phase with engines of so many GPUs, each of which answers `slots` requests at once."""
        config = self.config
        assert isinstance(config, RlConfig)
        rollout, budget = config.rollout, config.budget
        nodes = self.cluster.serving_nodes or self.cluster.nodes
        count = nodes * max(1, self.cluster.gpus_per_node // engine_gpus)
        engines = Engines(count=count, slots=slots, rates=self._engine_rates(engine_gpus, slots))
        take = self._workload.draw(rollout.samples_per_prompt, 0).take
        known, seconds, unfinished = {ANY: PromptYield()}, [], list[OpenGroup]()
        for _ in range(_PARTIAL_PHASES if rollout.partial else _PHASES):
            if config.has_budget and budget.under_full == "refill":
                budgets = config.phase_budgets(self.cluster.training_ranks)
                (need,) = shortfalls(budgets, {ANY: 1.0}, {}, known, rollout.max_response_tokens, budget.margin)
            else:
                need = Shortfall(unit="groups", missing=rollout.prompts_per_step)
            rolled = roll_out_phase(config, engines, take, need, unfinished, False)
            unfinished = rolled.unfinished
            seconds.append(rolled.seconds)
            known = {ANY: need.per_prompt}
        return float(np.mean(seconds[_PARTIAL_PHASES // 2 :] if rollout.partial else seconds[-1:]))

    def train_seconds(self, config: RunConfig, layout: Layout) -> float:
        """Predict the optimizer steps of a step, as if its tokens were divided evenly. config: its recomputation
        counts."""
        rates = self.rates
        flops = rates.train_flops if rates else _TRAIN_FLOPS
        passes = forward_passes(config) if isinstance(config, RlConfig) else passes_of_training(config)
        per_rank = self._tokens / layout.data
        rows = max(1.0, np.ceil(per_rank / config.micro_batch_cap))
        work = passes * self._forward_flops / (flops * layout.world_size)
        work += self._exchange_seconds(config, layout, per_rank)
        work += rows * (rates.micro_batch_seconds if rates else _MICRO_BATCH_SECONDS) / layout.pipeline
        optimizer = rates.optimizer_seconds if rates else _OPTIMIZER_SECONDS
        return float(work + pipeline_bubble(work, layout, rows) + optimizer + self._optimizer_seconds(config, layout))

    def pause_seconds(self, config: RunConfig, layout: Layout) -> float:
        """Predict the time between generation and training: the push of weights, and memory that changes hands."""
        if not isinstance(config, RlConfig):
            return 0.0
        rates = self.rates
        seconds = rates.sync_seconds if rates else _SYNC_SECONDS
        if config.rollout.release_memory:
            seconds += rates.switch_seconds if rates else _SWITCH_SECONDS
        if config.train.offload_while_generating:
            gradients, states = self._state_bytes(config, layout)
            seconds += 2 * (gradients + states * (1.0 - config.optimizer.offload_fraction)) / _HOST_LINK
        return seconds

    @cached_property
    def mean_tokens(self) -> float:
        """The mean length of a response, as far as the configuration says."""
        return float(self._workload.lengths.mean())

    @cached_property
    def _workload(self) -> Workload:
        assert isinstance(self.config, RlConfig)
        return assumed(self.config, self.cluster)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """The tokens of each sequence of a step, prompts included; as many as fill it."""
        config = self.config
        if isinstance(config, SftConfig):
            return np.full(max(1, config.data.batch_tokens // config.micro_batch_cap), config.micro_batch_cap)
        assert isinstance(config, RlConfig)
        workload = self._workload
        total = sum(config.phase_budgets(self.cluster.training_ranks)) if config.has_budget else 0
        count = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        count = round(total / workload.lengths.mean()) if total else count
        places = (np.arange(count) + 0.5) / count * len(workload.lengths)
        return np.sort(workload.lengths)[places.astype(int)] + workload.prompt_tokens

    @cached_property
    def _tokens(self) -> float:
        return float(self._lengths.sum())

    @cached_property
    def _forward_flops(self) -> float:
        cost = cost_model(self.architecture)
        lengths = self._lengths.astype(float)
        return float((cost.linear * lengths + cost.quadratic * lengths**2).sum())

    def _exchange_seconds(self, config: RunConfig, layout: Layout, num_tokens: float) -> float:
        """Predict the exchange of the tokens of a data-parallel rank: what tensor-parallel ranks gather and scatter for
        each layer, twice a pass each way, and what expert-parallel ranks send each other, there and back."""
        architecture, item = self.architecture, ITEM_BYTES[config.model.dtype]
        passes = _PASSES + (config.model.recompute != "none") * _RECOMPUTED
        hidden = architecture.hidden_size * item * num_tokens / layout.context
        tensor = 4 * passes * architecture.num_hidden_layers * hidden * (1 - 1 / layout.tensor)
        chosen = architecture.num_experts_per_tok * hidden / layout.tensor
        expert = 2 * passes * architecture.num_moe_layers * chosen * (1 - 1 / layout.expert)
        parts = ((tensor, layout.tensor), (expert, layout.expert * layout.expert_tensor))
        return sum(size / self._link(ranks) for size, ranks in parts) / layout.pipeline

    def _optimizer_seconds(self, config: RunConfig, layout: Layout) -> float:
        """Predict the part of an optimizer step that depends on the layout. Gradients are summed and weights come back,
        and states in host memory go to the GPU and back."""
        gradients, states = self._state_bytes(config, layout)
        reduce = 2 * gradients / self._link(layout.world_size // layout.pipeline) if layout.data > 1 else 0.0
        return reduce + 2 * config.optimizer.offload_fraction * states / _HOST_LINK

    def _state_bytes(self, config: RunConfig, layout: Layout) -> tuple[float, float]:
        """Return the bytes of the fullest rank: gradients, and its share of the optimizer's states."""
        replicas = layout.world_size // (layout.expert * layout.expert_tensor * layout.pipeline)
        dense, routed = max(trained_parameters(config.lora, self.architecture, layout), key=sum)
        states = (dense / (layout.data * layout.context) + routed / replicas) * OPTIMIZER_BYTES[config.model.dtype]
        return (dense + routed) * 4.0, states

    def _link(self, num_ranks: int) -> float:
        return _NODE_LINK if num_ranks <= self.cluster.gpus_per_node else _NETWORK

    def _engine_rates(self, gpus: int, slots: int) -> Rates:
        """Return the rates of an engine of so many GPUs."""
        numbers = sorted({1, max(1, slots // 8), slots})
        seconds = [self._iteration_seconds(gpus, number) for number in numbers]
        response = self.rates.response_seconds if self.rates else 0.0
        decode = tuple((number, number / second) for number, second in zip(numbers, seconds, strict=True))
        return Rates(decode=decode, train_flops=_TRAIN_FLOPS, response_seconds=response)

    def _iteration_seconds(self, gpus: int, running: int) -> float:
        launch = _LAUNCH_SECONDS + _REDUCE_SECONDS * np.log2(gpus)
        if self.rates is not None:
            assert isinstance(self.config, RlConfig)
            measured = self.rates.engine_gpus or self.config.rollout.sglang_gpus
            whole = float(self.rates.iteration_seconds(np.array([running]))[0])
            of_launch = min(whole, _LAUNCH_SECONDS + _REDUCE_SECONDS * np.log2(measured))
            return float(launch + (whole - of_launch) * measured / gpus)
        return float(launch + self._read_bytes(gpus, running) / _MEMORY)

    def _read_bytes(self, gpus: int, running: int) -> float:
        """Return the bytes that one GPU reads in an iteration: the weights that `running` tokens need, and their keys
        and values."""
        config, architecture = self.config, self.architecture
        assert isinstance(config, RlConfig)
        item = ITEM_BYTES[config.model.dtype]
        weights = float(architecture.num_parameters())
        if architecture.num_experts:
            width = 3 * architecture.hidden_size * architecture.moe_intermediate_size
            routed = architecture.num_moe_layers * architecture.num_experts * width
            hit = 1.0 - (1.0 - architecture.num_experts_per_tok / architecture.num_experts) ** running
            weights -= routed * (1.0 - hit)
        heads = architecture.num_key_value_heads
        cached = self.mean_tokens / 2 + self._workload.prompt_tokens
        per_token = 2 * architecture.num_hidden_layers * heads * architecture.head_dim * item
        return weights * item / gpus + running * cached * per_token / min(gpus, heads)
