"""The token budget: exact, conserving, deterministic, without a preference for short responses."""

import random
from collections import Counter
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.c3po.budget import Shortfall, select, selection_order

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def test_the_crossing_response_is_cut_so_that_exactly_phi_tokens_carry_loss() -> None:
    selection = select([5, 4, 7, 2], [2, 0, 1, 3], [14])
    assert [(p.index, p.num_loss_tokens) for p in selection.steps[0]] == [(2, 7), (0, 5), (1, 2)]
    assert selection.num_cut_tokens == 2
    assert selection.left_over == (3,)


def test_whole_responses_overshoot_when_the_cut_is_by_response() -> None:
    selection = select([5, 4, 7, 2], [2, 0, 1, 3], [14], cut="response")
    assert [p.num_loss_tokens for p in selection.steps[0]] == [7, 5, 4]
    assert selection.num_cut_tokens == 0


def test_a_response_that_ends_exactly_at_phi_is_not_cut() -> None:
    selection = select([6, 4, 3], [0, 1, 2], [10])
    assert [p.num_loss_tokens for p in selection.steps[0]] == [6, 4]
    assert selection.num_cut_tokens == 0


def test_each_optimizer_step_of_a_phase_has_its_own_budget() -> None:
    selection = select([4, 4, 4, 4, 4], [0, 1, 2, 3, 4], [6, 6])
    assert [[(p.index, p.num_loss_tokens) for p in s] for s in selection.steps] == [[(0, 4), (1, 2)], [(2, 4), (3, 2)]]
    assert selection.left_over == (4,)


@given(lengths=LENGTHS, budgets=st.lists(st.integers(1, 80), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_every_response_is_trained_or_left_over_and_every_token_is_accounted_for(
    lengths: list[int], budgets: list[int], seed: int
) -> None:
    order = selection_order(0, [1] * len(lengths), seed)
    selection = select(lengths, order, budgets)
    picked = [p.index for step in selection.steps for p in step]
    assert Counter(picked + list(selection.left_over)) == Counter(range(len(lengths)))
    trained = sum(p.num_loss_tokens for step in selection.steps for p in step)
    assert trained + selection.num_cut_tokens + sum(lengths[i] for i in selection.left_over) == sum(lengths)
    available = sum(lengths)
    for step, budget in zip(selection.steps, budgets, strict=True):
        tokens = sum(p.num_loss_tokens for p in step)
        assert tokens == min(budget, available)
        available -= sum(lengths[p.index] for p in step)


def test_carried_responses_come_first_and_groups_stay_whole() -> None:
    order = selection_order(2, [3, 3, 3], seed=5)
    assert order[:2] == [0, 1]
    blocks = [order[i : i + 3] for i in range(2, 11, 3)]
    assert sorted(blocks) == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]
    assert order == selection_order(2, [3, 3, 3], seed=5)
    assert any(order != selection_order(2, [3, 3, 3], seed) for seed in range(5))


def test_selection_has_no_preference_for_length() -> None:
    # Ten groups of one response, five short and five long: each must be first equally often.
    firsts = Counter(selection_order(0, [1] * 10, seed)[0] for seed in range(2000))
    chi_square = sum((firsts[i] - 200) ** 2 / 200 for i in range(10))
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_lengths_of_selected_responses_are_those_of_the_candidates() -> None:
    # Four lengths, equally many of each. A budget of 480 tokens takes at least eight responses whole, whatever they
    # are; the eighth must be of every length equally often. (The one that crosses the budget is longer on average, as
    # the bus one waits for is: its cut tail makes up for it, see the next test.)
    candidates = [10, 20, 40, 60] * 50
    eighth: Counter[int] = Counter()
    for seed in range(2000):
        (picks,) = select(candidates, selection_order(0, [1] * len(candidates), seed), [480]).steps
        assert all(pick.num_loss_tokens == candidates[pick.index] for pick in picks[:-1])
        eighth[candidates[picks[7].index]] += 1
    chi_square = sum((eighth[n] - 500) ** 2 / 500 for n in (10, 20, 40, 60))
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@given(halves=st.lists(st.integers(1, 50), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_a_budget_of_half_the_tokens_trains_half_of_every_response_on_average(halves: list[int], seed: int) -> None:
    # Exact, pair by pair: what an order cuts or leaves of a response, the reversed and equally likely order trains.
    lengths = [2 * half for half in halves]
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    trained: Counter[int] = Counter()
    for permutation in (order, order[::-1]):
        for pick in select(lengths, permutation, [sum(halves)]).steps[0]:
            trained[pick.index] += pick.num_loss_tokens
    assert [trained[i] for i in range(len(lengths))] == lengths


@given(lengths=LENGTHS, budget=st.integers(1, 80), cut=st.sampled_from(["token", "response"]))
def test_cutting_changes_how_much_of_the_last_response_is_trained_and_nothing_else(
    lengths: list[int], budget: int, cut: Literal["token", "response"]
) -> None:
    selection = select(lengths, range(len(lengths)), [budget], cut)
    (picks,) = selection.steps
    assert [pick.index for pick in picks] == list(range(len(picks)))
    assert all(pick.num_loss_tokens == lengths[pick.index] for pick in picks[:-1])
    whole = sum(lengths[: len(picks)])
    assert selection.num_cut_tokens == (max(0, whole - budget) if cut == "token" else 0)
    assert sum(lengths[: len(picks) - 1]) < budget  # the last one was needed


@given(lengths=LENGTHS, budgets=st.lists(st.integers(1, 80), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_several_steps_select_what_single_steps_in_turn_would(
    lengths: list[int], budgets: list[int], seed: int
) -> None:
    order = selection_order(0, [1] * len(lengths), seed)
    selection = select(lengths, order, budgets)
    assert selection == select(lengths, selection_order(0, [1] * len(lengths), seed), budgets)
    rest = tuple(order)
    for picks, budget in zip(selection.steps, budgets, strict=True):
        alone = select(lengths, rest, [budget])
        assert alone.steps == (picks,)
        rest = alone.left_over
    assert rest == selection.left_over


@pytest.mark.parametrize(
    ("missing", "per_prompt", "expected"),
    [(0, 40.0, 0), (-5, 40.0, 0), (1000, 40.0, 26), (1, 40.0, 2), (40, 40.0, 2), (41, 40.0, 3), (41, None, 7)],
)
def test_a_wave_launches_the_predicted_shortfall_of_tokens_and_one_group_more(
    missing: int, per_prompt: float | None, expected: int
) -> None:
    assert Shortfall(unit="tokens", missing=missing, per_prompt=per_prompt).more_prompts(first_wave=7) == expected


def test_filtered_groups_count_for_nothing_in_the_prediction() -> None:
    need = Shortfall(unit="groups", missing=6, per_prompt=1.0)
    assert need.more_prompts(first_wave=6) == 6
    need.add(6, [])  # nothing kept: nothing learnt
    assert (need.missing, need.more_prompts(6)) == (6, 6)
    need.add(6, [[5, 5], [1, 2], [3, 3]])  # 3 groups of 12 prompts so far
    assert (need.missing, need.more_prompts(6)) == (3, 12)
    tokens = Shortfall(unit="tokens", missing=100, per_prompt=None)
    tokens.add(4, [[5, 5], [10, 20]])  # 40 tokens of 4 prompts, 60 to go
    assert (tokens.missing, tokens.more_prompts(6)) == (60, 7)
