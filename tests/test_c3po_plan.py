"""Tests the plan of a train phase, made from scored groups."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample, make_schedule, make_segment, make_trajectory

from megatron_rl.c3po.algorithms import ALGORITHMS
from megatron_rl.records import Group


@settings(deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=1, max_size=12),
    carried=st.lists(st.integers(1, 30), max_size=5),
    seed=st.integers(0, 1000),
)
def test_samples_are_conserved_and_the_budget_is_exact(lengths: list[list[int]], carried: list[int], seed: int) -> None:
    groups = [
        Group(prompt_id=p, samples=tuple(make_sample(p, i, n) for i, n in enumerate(group)))
        for p, group in enumerate(lengths)
    ]
    old = tuple(make_sample(1000 + i, 0, n, version=2) for i, n in enumerate(carried))
    result = make_schedule(groups, old, seed=seed)
    (step,) = result.plan.steps
    assert step.num_loss_tokens == min(40, sum(map(sum, lengths)) + sum(carried))
    assert step.denominator == 40
    trained = {result.samples[s.index].id for s in step.selected}
    kept = {s.id for s in result.carried}
    assert trained.isdisjoint(kept)
    assert trained | kept == {s.id for g in groups for s in g.samples} | {s.id for s in old}
    placed = sorted(i for rank in step.micro_batches for bin_ in rank for i in bin_)
    assert placed == list(range(len(step.selected)))
    for selected in step.selected:
        is_old = result.samples[selected.index].response.policy_versions[-1] < 3
        assert selected.num_stale_tokens == (selected.num_loss_tokens if is_old else 0)
    # the plan does not depend on the order in which groups arrived
    assert make_schedule(groups[::-1], old, seed=seed).plan == result.plan


def test_grpo_trains_every_token_with_the_mean_over_each_response() -> None:
    groups = [Group(prompt_id=0, samples=(make_sample(0, 0, 10), make_sample(0, 1, 20)))]
    result = make_schedule(groups, algorithm=ALGORITHMS["grpo"], keep_surplus=False)
    (step,) = result.plan.steps
    assert step.denominator == 2
    assert {s.num_loss_tokens: s.loss_scale for s in step.selected} == {10: 1 / 10, 20: 1 / 20}


def test_the_samples_of_a_second_optimizer_step_are_not_fresh() -> None:
    groups = [Group(prompt_id=p, samples=(make_sample(p, 0, 10), make_sample(p, 1, 10))) for p in range(2)]
    first, second = make_schedule(groups, budgets=(20, 20)).plan.steps
    assert [s.num_stale_tokens for s in first.selected] == [0, 0]
    assert [s.num_stale_tokens for s in second.selected] == [10, 10]


@pytest.mark.parametrize(("budget", "expected"), [(40, (7, 20)), (5, (5, 5))])
def test_the_tokens_of_a_resumed_response_are_stale_up_to_where_these_weights_took_over(
    budget: int, expected: tuple[int, int]
) -> None:
    versions = np.repeat(np.array([1, 2, 3], np.int32), [3, 4, 13])
    resumed = make_trajectory(0, 0, [replace(make_segment(20), policy_versions=versions)])
    (step,) = make_schedule([Group(prompt_id=0, samples=(resumed,))], budgets=(budget,)).plan.steps
    assert (step.selected[0].num_stale_tokens, step.selected[0].num_loss_tokens) == expected


def test_domains_share_the_budget_and_not_the_denominator() -> None:
    # Prompts with an even id are science with short responses, the others code with long ones.
    groups = [
        Group(prompt_id=p, samples=tuple(make_sample(p, i, 25 if p % 2 else 3) for i in range(2))) for p in range(12)
    ]
    old = (make_sample(1001, 0, 6, version=2), make_sample(1000, 0, 4, version=2))
    shares = {"code": 0.7, "science": 0.3}
    options = {"shares": shares, "domain_of": lambda prompt_id: "code" if prompt_id % 2 else "science"}
    result = make_schedule(groups, old, budgets=(40, 40), **options)
    trained = set()
    for step in result.plan.steps:
        tokens = {0: 0, 1: 0}
        for selected in step.selected:
            sample = result.samples[selected.index]
            tokens[sample.response.prompt_id % 2] += selected.num_loss_tokens
            trained.add(sample.id)
        assert tokens == {0: 12, 1: 28}
        assert step.denominator == 40
    # The carried ones of each domain are its first.
    assert {(1001, 0), (1000, 0)} <= {result.samples[s.index].id for s in result.plan.steps[0].selected}
    kept = {s.id for s in result.carried}
    assert trained.isdisjoint(kept)
    assert trained | kept == {s.id for g in groups for s in g.samples} | {s.id for s in old}
    assert make_schedule(groups[::-1], old, budgets=(40, 40), **options).plan == result.plan
