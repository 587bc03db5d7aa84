"""Micro-batches of a synchronous step: every data-parallel rank runs the same number, none above the token cap.

With expert parallelism across data-parallel ranks each micro-batch is a barrier, so a step costs the sum over
micro-batches of the maximum over ranks.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.bailing import BailingConfig

MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Forward cost of a sequence of n tokens: linear * n + quadratic * n^2, in multiply-adds times two."""

    linear: float
    quadratic: float

    def __call__(self, num_tokens: int) -> float:
        return self.linear * num_tokens + self.quadratic * num_tokens * num_tokens


def cost_model(model: BailingConfig) -> CostModel:
    """2 FLOPs per active weight and token; causal attention, 2 * layers * heads * head_dim * n^2."""
    inactive = (model.num_experts - model.num_experts_per_tok) * 3 * model.hidden_size * model.moe_intermediate_size
    num_moe_layers = model.num_hidden_layers - min(model.first_k_dense_replace, model.num_hidden_layers)
    active = model.num_parameters() - num_moe_layers * inactive - model.vocab_size * model.hidden_size
    width = model.num_attention_heads * model.head_dim
    return CostModel(linear=2.0 * active, quadratic=2.0 * model.num_hidden_layers * width)


def pack_micro_batches(lengths: Sequence[int], num_ranks: int, token_cap: int, cost: CostModel) -> MicroBatches:
    """`result[rank][i]`: positions in `lengths` that data-parallel rank `rank` runs in its i-th micro-batch.

    Longest first, each into the cheapest bin that still has room; bins of like cost then share a micro-batch. The
    number of bins per rank is the smallest that works. With fewer sequences than ranks some micro-batches are empty.
    ValueError when one sequence alone is over the cap.
    """
    for length in lengths:
        if length > token_cap:
            raise ValueError(
                f"a sequence of {length} tokens is over the micro-batch cap of {token_cap}; "
                "raise train.micro_batch_tokens or lower rollout.max_response_tokens"
            )
    count = max(1, -(-sum(lengths) // (token_cap * num_ranks)))
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while (bins := _fill(lengths, longest_first, count * num_ranks, token_cap, cost)) is None:
        count += 1
    bins.sort(key=lambda members: -sum(cost(lengths[i]) for i in members))
    return tuple(tuple(tuple(bins[m * num_ranks + rank]) for m in range(count)) for rank in range(num_ranks))


def _fill(
    lengths: Sequence[int], order: Sequence[int], num_bins: int, token_cap: int, cost: CostModel
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for index in order:
        full = []
        while heap and tokens[heap[0][1]] + lengths[index] > token_cap:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heapq.heappop(heap)
        bins[b].append(index)
        tokens[b] += lengths[index]
        for entry in [*full, (load + cost(lengths[index]), b)]:
            heapq.heappush(heap, entry)
    return bins


def barrier_cost(micro_batches: MicroBatches, lengths: Sequence[int], cost: CostModel) -> float:
    """Sum over micro-batches of the maximum over ranks."""
    return sum(
        max(sum(cost(lengths[i]) for i in rank_bins) for rank_bins in row) for row in zip(*micro_batches, strict=True)
    )
