"""Tests micro-batches: under the cap, equally many on every rank, without losses, and near a proven bound."""

import json
import random
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.c3po.packing import (
    NEAR_EQUAL,
    CostModel,
    barrier_cost,
    cost_model,
    lower_bound,
    pack_micro_batches,
)
from megatron_rl.families import Architecture

BENCH = Path(__file__).parents[1] / "tools" / "bench_schedule.py"
COST = CostModel(linear=1.0, quadratic=0.05)
ROUNDING = 1 + 1e-9

costs = st.builds(CostModel, linear=st.sampled_from([0.5, 1.0]), quadratic=st.sampled_from([0.0, 0.01, 0.05, 1.0]))


def placements(lengths: Sequence[int], token_cap: int) -> Iterator[list[list[int]]]:
    """Yield every way to divide the sequences into bins under the cap."""

    def extend(bins: list[list[int]], rest: Sequence[int]) -> Iterator[list[list[int]]]:
        if not rest:
            yield bins
            return
        for b, members in enumerate(bins):
            if sum(members) + rest[0] <= token_cap:
                yield from extend([*bins[:b], [*members, rest[0]], *bins[b + 1 :]], rest[1:])
        yield from extend([*bins, [rest[0]]], rest[1:])

    return extend([], lengths)


def best_cost(lengths: Sequence[int], num_ranks: int, token_cap: int, cost: CostModel) -> float:
    """Return the least barrier cost of any placement.

    With given bins, it is best to put bins of like cost into one row. The j-th costliest row costs at least as much as
    the bin that (j - 1) * num_ranks bins are at least as costly as, and this placement costs no more.
    """
    return min(
        sum(sorted((sum(map(cost, members)) for members in bins), reverse=True)[::num_ranks])
        for bins in placements(lengths, token_cap)
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), max_size=50),
    ranks=st.integers(1, 6),
    cap=st.integers(64, 200),
    cost=costs,
    multiple_of=st.integers(1, 4),
)
def test_every_sequence_is_placed_once_under_the_cap_with_equal_counts(
    lengths: list[int], ranks: int, cap: int, cost: CostModel, multiple_of: int
) -> None:
    placed = pack_micro_batches(lengths, ranks, cap, cost, multiple_of=multiple_of)
    assert len(placed) == ranks
    assert len({len(rank) for rank in placed}) == 1
    assert len(placed[0]) >= 1
    assert len(placed[0]) % multiple_of == 0
    assert Counter(i for rank in placed for bin_ in rank for i in bin_) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= cap for rank in placed for bin_ in rank)
    assert placed == pack_micro_batches(lengths, ranks, cap, cost, multiple_of=multiple_of)


@pytest.mark.parametrize(("multiple_of", "expected"), [(1, 1), (4, 4)])
def test_ranks_without_sequences_take_part_with_empty_micro_batches(multiple_of: int, expected: int) -> None:
    placed = pack_micro_batches([5], 3, 64, COST, multiple_of=multiple_of)
    assert [len(rank) for rank in placed] == [expected] * 3
    assert sorted(bin_ for rank in placed for bin_ in rank if bin_) == [(0,)]
    assert pack_micro_batches([], 2, 64, COST, multiple_of=multiple_of) == (((),) * expected,) * 2


def test_a_sequence_over_the_cap_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"65 tokens is over the micro-batch cap of 64; raise train.micro_batch_tokens"
    ):
        pack_micro_batches([65], 1, 64, COST)


def test_barrier_cost_is_the_sum_over_micro_batches_of_the_maximum_over_ranks() -> None:
    linear = CostModel(linear=1.0, quadratic=0.0)
    placed = (((0,), (1,)), ((2,), (3,)))  # rank 0 runs 0 then 1, rank 1 runs 2 then 3
    assert barrier_cost(placed, [5, 1, 3, 9], linear) == max(5, 3) + max(1, 9)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    ranks=st.integers(1, 3),
    cap=st.integers(20, 60),
    cost=costs,
)
def test_no_placement_is_cheaper_than_the_lower_bound(
    lengths: list[int], ranks: int, cap: int, cost: CostModel
) -> None:
    best = best_cost(lengths, ranks, cap, cost)
    assert lower_bound(lengths, ranks, cap, cost) <= best * ROUNDING
    assert best <= barrier_cost(pack_micro_batches(lengths, ranks, cap, cost), lengths, cost) * ROUNDING


@pytest.mark.parametrize(
    ("lengths", "linear", "quadratic", "expected"),
    [
        ([4, 4, 4, 4], 1.0, 0.0, 8.0),  # the ideal: 16 / 2
        ([10, 1, 1], 1.0, 0.0, 10.0),  # the longest
        ([10, 10, 7, 6], 1.0, 0.0, 17.0),  # four longer than half the cap: rows of 10 and of 7
        ([5, 5, 5, 5, 5], 1.0, 0.0, 15.0),  # one of the ranks has three of them, in whatever rows
        # The row of the 10 costs 100. It holds 20 tokens, 120 at most; the other four 2s cost 16, 8 per rank.
        ([10, *[2] * 9], 0.0, 1.0, 108.0),
    ],
)
def test_lower_bound_by_hand(lengths: list[int], linear: float, quadratic: float, expected: float) -> None:
    cost = CostModel(linear=linear, quadratic=quadratic)
    assert lower_bound(lengths, 2, 10, cost) == pytest.approx(expected)
    assert barrier_cost(pack_micro_batches(lengths, 2, 10, cost), lengths, cost) >= expected


def test_lower_bound_of_nothing_is_zero() -> None:
    assert lower_bound([], 2, 10, COST) == 0.0


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7), ranks=st.integers(1, 3), cost=costs)
def test_a_single_row_keeps_the_bound_of_longest_first_scheduling(
    lengths: list[int], ranks: int, cost: CostModel
) -> None:
    # Everything fits one bin, so one row is best: merging rows never costs more. Graham 1969: 4/3 - 1/(3 D).
    cap = sum(lengths)
    reached = barrier_cost(pack_micro_batches(lengths, ranks, cap, cost), lengths, cost)
    assert reached <= (4 / 3 - 1 / (3 * ranks)) * best_cost(lengths, ranks, cap, cost) * ROUNDING


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=60), ranks=st.integers(1, 6), cap=st.integers(64, 200), cost=costs)
def test_a_plan_is_never_worse_than_longest_first(lengths: list[int], ranks: int, cap: int, cost: CostModel) -> None:
    greedy = runpy.run_path(str(BENCH))["longest_first"](lengths, ranks, cap, cost)
    limit = barrier_cost(greedy, lengths, cost) * (1 + NEAR_EQUAL) * ROUNDING
    assert barrier_cost(pack_micro_batches(lengths, ranks, cap, cost), lengths, cost) <= limit


@pytest.mark.parametrize(("num_samples", "ranks"), [(64, 2), (1024, 8), (1024, 64), (2048, 256)])
def test_heavy_tailed_lengths_are_planned_near_the_bound(num_samples: int, ranks: int) -> None:
    generator = random.Random(1)
    lengths = [min(32_768, 1 + int(generator.lognormvariate(6.7, 1.2))) for _ in range(num_samples)]
    cost = CostModel(linear=2 * 2.494e9, quadratic=2 * 28 * 2048)
    reached = barrier_cost(pack_micro_batches(lengths, ranks, 32_768, cost), lengths, cost)
    assert reached <= 1.01 * lower_bound(lengths, ranks, 32_768, cost)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60), ranks=st.integers(1, 6), cap=st.integers(64, 150))
def test_whole_ranks_differ_by_no_more_than_the_bins_of_one_row(lengths: list[int], ranks: int, cap: int) -> None:
    # The costliest bin goes to the idlest rank, so a difference either shrinks or is that of the row just added.
    loads = [
        [sum(COST(lengths[i]) for i in bin_) for bin_ in rank] for rank in pack_micro_batches(lengths, ranks, cap, COST)
    ]
    totals = [sum(rank) for rank in loads]
    assert max(totals) - min(totals) <= max(max(row) - min(row) for row in zip(*loads, strict=True)) + 1e-6


@given(cost=costs, short=st.integers(1, 40_000), more=st.integers(1, 40_000))
def test_a_longer_sequence_costs_more_and_no_less_than_its_parts(cost: CostModel, short: int, more: int) -> None:
    assert cost(short + more) > cost(short) > 0
    assert cost(short + more) * ROUNDING >= cost(short) + cost(more)


def run_bench(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCH), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parents[1], check=False)


def test_the_benchmark_prints_json_and_says_what_it_needs(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("\n".join(str(1 + 37 * i % 40_000) for i in range(8192)))
    result = json.loads(run_bench(lengths, "--seeds", 1).stdout)
    assert [(case["num_samples"], case["num_ranks"]) for case in result["cases"]] == [(4096, 8), (8192, 256)]
    for case in result["cases"]:
        assert 1.0 <= case["planners"]["megatron_rl"]["over_bound"]["mean"] <= 1.1
    missing = run_bench(tmp_path / "missing.csv")
    assert missing.returncode == 2
    assert "missing.csv does not exist; give a file with one response length per line" in missing.stderr


def test_cost_of_ling_lite_counts_its_active_weights() -> None:
    ling = Architecture(
        family="bailing_moe",
        vocab_size=126464,
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=6,
        shared_intermediate_size=2 * 1408,
        max_position_embeddings=16384,
        eos_token_ids=(1,),
    )
    assert ling.num_parameters() == 16_801_974_272
    cost = cost_model(ling)
    # 2.753 B active parameters, of which the input embedding's 0.259 B multiply nothing: bench-schedule's 2.494 B.
    assert cost.linear == pytest.approx(2 * 2.494e9, rel=2e-3)
    assert cost.quadratic == 2 * 28 * 2048
