"""Computes parallel layouts: how ranks are divided, and what divides what. No torch, no megatron."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.families import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Holds the sizes of the parallel groups of one training world. `data` follows from the world size.

    The ranks of a context-parallel group train the same sequences, each its part of every one (model/zigzag.py).
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1

    @property
    def sequence_parallel(self) -> bool:
        """Tell whether there is sequence parallelism; Megatron trains mixture-of-experts layers under tensor
        parallelism only with it."""
        return self.tensor > 1

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def data_rank(self, rank: int) -> int:
        """Return the data-parallel rank of a global rank in megatron's order tp-cp-ep-dp-pp."""
        return rank // (self.tensor * self.context) % self.data

    @property
    def micro_batch_multiple(self) -> int:
        """Return what the number of a rank's micro-batches must be a multiple of, for the interleaved pipeline
        schedule."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Return the number of layers of each of the pipeline x virtual_pipeline stages in the order of the model,
        equal or one apart: the last stage, which has the head, is the first to have fewer, then the first stage, which
        has the embedding. Pipeline rank r runs stages r, r + pipeline, r + 2 pipeline, ..."""
        num_stages = self.pipeline * self.virtual_pipeline
        even, left = divmod(num_layers, num_stages)
        takers = [*range(1, num_stages - 1), 0][:left]
        return tuple(even + (stage in takers) for stage in range(num_stages))

    def check(self, model: Architecture) -> None:
        """Raise ValueError when this world or this model cannot be divided so."""
        for problem in self.problems(model):
            raise ValueError(problem)

    def problems(self, model: Architecture) -> Iterator[str]:
        """Yield all that cannot be divided, each with its remedy."""
        sizes = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
        small = [name for name in sizes if getattr(self, name) < 1]
        yield from (f"parallel.{name} must be at least 1, got {getattr(self, name)}" for name in small)
        if small:
            return
        product = self.tensor * self.pipeline * self.context
        if self.world_size % product:
            yield (
                f"{self.world_size} training process(es) cannot be divided by tensor {self.tensor} x pipeline "
                f"{self.pipeline} x context {self.context} = {product}; start a multiple of {product} processes "
                "(torchrun --nproc_per_node) or change [parallel]"
            )
        expert_product = self.expert * self.expert_tensor * self.pipeline
        if self.world_size % expert_product:
            yield (
                f"{self.world_size} training process(es) cannot be divided by expert {self.expert} x expert_tensor "
                f"{self.expert_tensor} x pipeline {self.pipeline} = {expert_product}; change [parallel]"
            )
        yield from self._undivided_heads(model)
        yield from self._undivided_experts(model)
        if model.num_dense_layers:
            yield from _undivided("tensor", self.tensor, "intermediate_size", model.intermediate_size)
        if self.virtual_pipeline > 1 and self.pipeline < 3:
            # With two stages the next rank is the previous one too, and megatron's exchange of shapes (needed for
            # micro-batches of different lengths) then takes what the one sends forward for what it sends backward.
            yield (
                f"parallel.virtual_pipeline {self.virtual_pipeline} needs parallel.pipeline of at least 3, got "
                f"{self.pipeline}; set virtual_pipeline to 1 or more pipeline stages"
            )
        num_stages = self.pipeline * self.virtual_pipeline
        if num_stages > model.num_hidden_layers:
            yield (
                f"parallel.pipeline {self.pipeline} x virtual_pipeline {self.virtual_pipeline} = {num_stages} must be "
                f"at most num_hidden_layers {model.num_hidden_layers}"
            )

    def _undivided_heads(self, model: Architecture) -> Iterator[str]:
        """Tell when ranks would not have equal heads. Several ranks may share a key-value head: then each of them has
        the keys and values of one, and its own part of the queries that look at it."""
        queries, pairs = model.num_attention_heads, model.num_key_value_heads

        def divides(size: int) -> bool:
            rows = (queries + 2 * pairs) * model.head_dim
            return queries % size == 0 and rows % size == 0 and (pairs % size == 0 or size % pairs == 0)

        if not divides(self.tensor):
            sizes = [size for size in range(1, queries + 1) if divides(size)]
            yield (
                f"parallel.tensor {self.tensor} does not divide num_attention_heads {queries} and "
                f"num_key_value_heads {pairs} evenly; it can be one of {sizes}"
            )

    def _undivided_experts(self, model: Architecture) -> Iterator[str]:
        if not model.num_experts:
            for name in ("expert", "expert_tensor"):
                if getattr(self, name) > 1:
                    yield f"parallel.{name} must be 1 for a model without experts, got {getattr(self, name)}"
            return
        width = model.moe_intermediate_size
        yield from _undivided("expert", self.expert, "num_experts", model.num_experts)
        yield from _undivided("expert_tensor", self.expert_tensor, "moe_intermediate_size", width)
        if model.shared_intermediate_size:
            yield from _undivided("tensor", self.tensor, "shared expert width", model.shared_intermediate_size)


def _undivided(name: str, size: int, what: str, number: int) -> Iterator[str]:
    if number % size:
        divisors = [d for d in range(1, number + 1) if number % d == 0]
        yield f"parallel.{name} must divide {what} {number}, got {size}; it can be one of {divisors}"
