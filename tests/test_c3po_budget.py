"""Tests that the token budget is exact, conserving and deterministic, and does not prefer short responses."""

import asyncio
import itertools
import random
import statistics
from collections import Counter
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample

from megatron_rl.c3po.budget import (
    ANY,
    PromptYield,
    Shortfall,
    apportion,
    most_lacking,
    select,
    select_by_domain,
    selection_order,
    shortfalls,
)
from megatron_rl.records import Group
from megatron_rl.rollout.sampler import fill_in_waves

SHARES = {"code": 0.5, "math": 0.3, "science": 0.2}
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
    # Each pair of orders is exact: what one cuts or leaves of a response is trained by its reverse, as likely as it.
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


def brings(mean: float, deviation: float = 0.0) -> PromptYield:
    """Return the yield of two prompts, with this mean and standard deviation."""
    return PromptYield().add(2, [mean - deviation, mean + deviation])


@pytest.mark.parametrize(
    ("missing", "per_prompt", "margin", "expected"),
    [
        (0, brings(40), 1.0, 0),
        (-5, brings(40), 1.0, 0),
        (1000, brings(40), 1.0, 25),  # no deviation, no margin
        (41, PromptYield(), 1.0, 7),  # nothing is known
        (1000, brings(40, 20), 0.0, 25),
        (900, brings(40, 20), 1.0, 25),  # 25 prompts bring 1000 less 5 * 20
        (901, brings(40, 20), 1.0, 26),
        (900, brings(40, 20), 2.0, 28),
    ],
)
def test_a_wave_is_what_brings_the_missing_tokens_by_a_margin_of_deviations(
    missing: int, per_prompt: PromptYield, margin: float, expected: int
) -> None:
    need = Shortfall(unit="tokens", missing=missing, margin=margin, per_prompt=per_prompt)
    assert need.more_prompts(first_wave=7) == expected


@given(
    missing=st.integers(1, 5000),
    brought=st.lists(st.integers(1, 400), min_size=1, max_size=9),
    filtered=st.integers(0, 4),
    margin=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)
def test_a_wave_is_the_smallest_that_does(missing: int, brought: list[int], filtered: int, margin: float) -> None:
    all_brought = [*brought, *([0] * filtered)]
    mean, deviation = statistics.mean(all_brought), statistics.pstdev(all_brought)
    per_prompt = PromptYield().add(len(all_brought), brought)
    need = Shortfall(unit="tokens", missing=missing, margin=margin, per_prompt=per_prompt)
    count = need.more_prompts(first_wave=1)
    expected = next(n for n in itertools.count(1) if n * mean - margin * deviation * n**0.5 >= missing - 1e-6)
    assert count == expected


def test_filtered_groups_count_for_nothing_in_the_prediction() -> None:
    need = Shortfall(unit="groups", missing=6)
    assert need.more_prompts(first_wave=6) == 6
    need.add(6, [])  # nothing kept: nothing to plan by
    assert (need.missing, need.more_prompts(6)) == (6, 6)
    need.add(6, [[5, 5], [1, 2], [3, 3]])  # 3 groups of 12 prompts so far
    assert (need.missing, need.more_prompts(6)) == (3, 12)
    tokens = Shortfall(unit="tokens", missing=100)
    tokens.add(4, [[5, 5], [10, 20]])  # 40 tokens of 4 prompts, 60 to go
    assert (tokens.missing, tokens.more_prompts(6)) == (60, 6)


def test_earlier_phases_fade_from_the_prediction() -> None:
    first = PromptYield().add(10, [100] * 10)
    (need,) = shortfalls([1000], {ANY: 1.0}, {}, {ANY: first}, 60, 1.0)
    need.add(8, [[50]] * 8)
    assert need.per_prompt.mean == pytest.approx((0.8 * 10 * 100 + 8 * 50) / (0.8 * 10 + 8))
    assert need.per_prompt.deviation == pytest.approx(25)  # half of them each 25 off


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [
        (100, {"a": 0.29, "b": 0.71}, {"a": 29, "b": 71}),  # 0.29 * 100 is 28.999999999999996
        (10, {"a": 0.333, "b": 0.333, "c": 0.334}, {"a": 3, "b": 3, "c": 4}),
        (5, {"b": 0.5, "a": 0.5}, {"a": 3, "b": 2}),
        (7, {"a": 1.0}, {"a": 7}),
    ],
)
def test_whole_parts_go_to_the_largest_remainders(total: int, shares: dict[str, float], expected: dict) -> None:
    assert apportion(total, shares) == expected


@given(total=st.integers(0, 10**9), weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_whole_parts_sum_to_the_whole_and_are_off_by_less_than_one(total: int, weights: list[int]) -> None:
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    parts = apportion(total, shares)
    assert sum(parts.values()) == total
    for i, weight in enumerate(weights):
        assert abs(parts[str(i)] * sum(weights) - total * weight) < sum(weights) * 1.001


@given(
    candidates=st.lists(st.tuples(st.integers(1, 50), st.sampled_from(sorted(SHARES))), min_size=1, max_size=60),
    budgets=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    cut=st.sampled_from(["token", "response"]),
    seed=st.integers(0, 99),
)
def test_every_domain_is_selected_in_order_from_its_part_of_each_budget_and_from_nothing_else(
    candidates: list[tuple[int, str]], budgets: list[int], cut: Literal["token", "response"], seed: int
) -> None:
    lengths, domains = [n for n, _ in candidates], [domain for _, domain in candidates]
    order = selection_order(0, [1] * len(lengths), seed)
    found = select_by_domain(lengths, domains, order, budgets, SHARES, cut)
    picked = [pick.index for step in found.steps for pick in step]
    assert Counter([*picked, *found.left_over]) == Counter(range(len(lengths)))
    for part in (*([pick.index for pick in step] for step in found.steps), list(found.left_over)):
        assert part == sorted(part, key=order.index)
    for domain in SHARES:
        left = [i for i in order if domains[i] == domain]
        for step, budget in zip(found.steps, budgets, strict=True):
            # Whole responses in order, from where the step before ended, until the part is full.
            mine = [pick for pick in step if domains[pick.index] == domain]
            assert [pick.index for pick in mine] == left[: len(mine)]
            whole, wanted = sum(lengths[pick.index] for pick in mine), apportion(budget, SHARES)[domain]
            tokens = sum(pick.num_loss_tokens for pick in mine)
            assert tokens == (min(wanted, whole) if cut == "token" else whole)
            assert not mine or whole - lengths[mine[-1].index] < wanted
            left = left[len(mine) :]
            assert whole >= wanted or not left
    trained = sum(pick.num_loss_tokens for step in found.steps for pick in step)
    assert trained + found.num_cut_tokens + sum(lengths[i] for i in found.left_over) == sum(lengths)
    alone = select_by_domain(lengths, [ANY] * len(lengths), order, budgets, {ANY: 1.0}, cut)
    assert alone == select(lengths, order, budgets, cut)


@pytest.mark.parametrize("shares", [SHARES, {ANY: 1.0}])
@settings(max_examples=25, deadline=None)
@given(
    phi=st.integers(60, 500),
    num_steps=st.integers(1, 8),
    longest=st.fixed_dictionaries({domain: st.integers(5, 60) for domain in SHARES}),
    filtered=st.floats(0, 0.6),
    seed=st.integers(0, 10_000),
)
def test_refilling_gives_every_optimizer_step_exactly_its_part_of_every_domain(
    shares: dict[str, float], phi: int, num_steps: int, longest: dict[str, int], filtered: float, seed: int
) -> None:
    # Prompts of a domain bring two responses of up to `longest` tokens, or nothing where the group is filtered.
    dice = random.Random(seed)
    budgets = [phi] * num_steps
    per_prompt = dict.fromkeys(shares, PromptYield())
    carried: list[tuple[str, int]] = []
    for _ in range(3):
        have = Counter({domain: sum(n for d, n in carried if d == domain) for domain in shares})
        needs = shortfalls(budgets, shares, have, per_prompt, 60, 1.0)
        fresh: list[tuple[str, int]] = []
        for need in needs:

            async def wave(count: int, domain: str = need.domain) -> list[Group]:
                return [
                    Group(
                        prompt_id=i,
                        samples=tuple(make_sample(i, j, dice.randint(1, longest.get(domain, 60))) for j in (0, 1)),
                    )
                    for i in range(count)
                ]

            found = asyncio.run(fill_in_waves(wave, 4, need, lambda _: dice.random() >= filtered, 1000))
            fresh += [(need.domain, s.response.num_policy_tokens) for group in found.kept for s in group.samples]
        per_prompt = {need.domain: need.per_prompt for need in needs}
        candidates = [*carried, *fresh]
        order = selection_order(len(carried), [2] * (len(fresh) // 2), seed)
        domains = [domain for domain, _ in candidates]
        selection = select_by_domain([n for _, n in candidates], domains, order, budgets, shares)
        for step in selection.steps:
            tokens: Counter[str] = Counter()
            for pick in step:
                tokens[domains[pick.index]] += pick.num_loss_tokens
            assert tokens == apportion(phi, shares)
            assert tokens.total() == phi
        carried = [candidates[i] for i in selection.left_over]


def test_a_free_slot_goes_to_the_domain_whose_open_prompts_cover_least_of_what_it_lacks() -> None:
    code = Shortfall(unit="tokens", domain="code", missing=900, per_prompt=brings(300))  # three more prompts
    science = Shortfall(unit="tokens", domain="science", missing=600, per_prompt=brings(20))  # thirty
    assert most_lacking([code, science], Counter(code=1, science=9)) is science
    assert most_lacking([code, science], Counter(code=1, science=11)) is code
    unknown = Shortfall(unit="tokens", domain="science", missing=600)
    assert most_lacking([code, unknown], Counter(code=4, science=2)) is unknown  # 4 / 900 against 2 / 600
    assert most_lacking([code, unknown], Counter(code=4, science=3)) is code
