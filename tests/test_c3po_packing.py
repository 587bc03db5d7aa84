"""Micro-batches: under the cap, equally many on every rank, nothing lost, and not far from the best possible."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.c3po.packing import CostModel, barrier_cost, cost_model, pack_micro_batches
from megatron_rl.config.bailing import BailingConfig

COST = CostModel(linear=1.0, quadratic=0.05)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=50), ranks=st.integers(1, 6), cap=st.integers(64, 200))
def test_every_sequence_is_placed_once_under_the_cap_with_equal_counts(
    lengths: list[int], ranks: int, cap: int
) -> None:
    placed = pack_micro_batches(lengths, ranks, cap, COST)
    assert len(placed) == ranks
    assert len({len(rank) for rank in placed}) == 1
    assert len(placed[0]) >= 1
    assert Counter(i for rank in placed for bin_ in rank for i in bin_) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= cap for rank in placed for bin_ in rank)
    assert placed == pack_micro_batches(lengths, ranks, cap, COST)


def test_a_sequence_over_the_cap_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"65 tokens is over the micro-batch cap of 64; raise train.micro_batch_tokens"
    ):
        pack_micro_batches([65], 1, 64, COST)


def test_barrier_cost_is_the_sum_over_micro_batches_of_the_maximum_over_ranks() -> None:
    linear = CostModel(linear=1.0, quadratic=0.0)
    placed = (((0,), (1,)), ((2,), (3,)))  # rank 0 runs 0 then 1, rank 1 runs 2 then 3
    assert barrier_cost(placed, [5, 1, 3, 9], linear) == max(5, 3) + max(1, 9)


def test_greedy_packing_is_within_a_fifth_of_the_best_placement() -> None:
    lengths, ranks = [9, 7, 6, 5, 4, 4, 3], 2
    best = min(
        max(sum(COST(n) for n, r in zip(lengths, choice, strict=True) if r == rank) for rank in range(ranks))
        for choice in itertools.product(range(ranks), repeat=len(lengths))
    )
    assert barrier_cost(pack_micro_batches(lengths, ranks, 1000, COST), lengths, COST) <= 1.2 * best


def test_cost_of_ling_lite_counts_its_active_weights() -> None:
    ling = BailingConfig(
        model_type="bailing_moe",
        vocab_size=126464,
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=6,
        num_shared_experts=2,
        max_position_embeddings=16384,
        eos_token_id=1,
        pad_token_id=1,
    )
    assert ling.num_parameters() == 16_801_974_272
    cost = cost_model(ling)
    # 2.753 B active parameters, of which the input embedding's 0.259 B multiply nothing: bench-schedule's 2.494 B.
    assert cost.linear == pytest.approx(2 * 2.494e9, rel=2e-3)
    assert cost.quadratic == 2 * 28 * 2048
