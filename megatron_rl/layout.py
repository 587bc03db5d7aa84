"""Parallel layout arithmetic: how ranks are divided, and what divides what. No torch, no megatron."""

from dataclasses import dataclass

from megatron_rl.config.bailing import BailingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups of one training world. `data` follows from the world size.

    The ranks of a context-parallel group train the same sequences, each its part of every one (model/zigzag.py).
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1

    @property
    def sequence_parallel(self) -> bool:
        """Megatron trains mixture-of-experts layers under tensor parallelism with sequence parallelism only."""
        return self.tensor > 1

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def data_rank(self, rank: int) -> int:
        """Data-parallel rank of a global rank in megatron's order tp-cp-ep-dp-pp."""
        return rank // (self.tensor * self.context) % self.data

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage, equal or one apart: the last stage, which has the head, is the first to have
        fewer, then the first stage, which has the embedding."""
        even, left = divmod(num_layers, self.pipeline)
        takers = [*range(1, self.pipeline - 1), 0][:left]
        return tuple(even + (stage in takers) for stage in range(self.pipeline))

    def check(self, model: BailingConfig) -> None:
        """ValueError when this world or this model cannot be divided so."""
        for name in ("tensor", "pipeline", "expert", "expert_tensor", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        product = self.tensor * self.pipeline * self.context
        if self.world_size % product:
            raise ValueError(
                f"{self.world_size} training process(es) cannot be divided by tensor {self.tensor} x pipeline "
                f"{self.pipeline} x context {self.context} = {product}; start a multiple of {product} processes "
                "(torchrun --nproc_per_node) or change [parallel]"
            )
        expert_product = self.expert * self.expert_tensor * self.pipeline
        if self.world_size % expert_product:
            raise ValueError(
                f"{self.world_size} training process(es) cannot be divided by expert {self.expert} x expert_tensor "
                f"{self.expert_tensor} x pipeline {self.pipeline} = {expert_product}; change [parallel]"
            )
        _must_divide("tensor", self.tensor, "num_attention_heads", model.num_attention_heads)
        _must_divide("tensor", self.tensor, "num_key_value_heads", model.num_key_value_heads)
        _must_divide("expert", self.expert, "num_experts", model.num_experts)
        _must_divide("expert_tensor", self.expert_tensor, "moe_intermediate_size", model.moe_intermediate_size)
        if model.num_shared_experts:
            _must_divide("tensor", self.tensor, "shared expert width", model.shared_intermediate_size)
        if model.first_k_dense_replace:
            _must_divide("tensor", self.tensor, "intermediate_size", model.intermediate_size)
        if self.pipeline > model.num_hidden_layers:
            raise ValueError(
                f"parallel.pipeline must be at most num_hidden_layers {model.num_hidden_layers}, got {self.pipeline}"
            )


def _must_divide(name: str, size: int, what: str, number: int) -> None:
    if number % size:
        divisors = [d for d in range(1, number + 1) if number % d == 0]
        raise ValueError(f"parallel.{name} must divide {what} {number}, got {size}; it can be one of {divisors}")
