"""This module makes a plan for one train phase from scored samples. It is pure: the same arguments give the same plan
on any machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

from megatron_rl.c3po.algorithms import Algorithm, normalise
from megatron_rl.c3po.budget import ANY, Pick, Selection, select_by_domain, selection_order
from megatron_rl.c3po.packing import CostModel, pack_micro_batches
from megatron_rl.records import Group, Plan, Response, Sample, Selected, StepPlan

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Holds a plan over `samples`, and where the samples that it does not use go. A sample without a policy token goes
    nowhere.

    samples: carried first, then group by group; `Selected.index` points here.
    carried: surplus for the next step, in order.
    num_dropped: surplus that the algorithm throws away.
    masked: samples, by their place in `samples`, that took their part of a step but carry no loss; they are in no plan.
    num_cut_tokens: policy tokens of trained responses that carry no loss.
    num_passes: the number of passes over the same responses; the optimizer steps of the first one come first.
    """

    plan: Plan
    samples: tuple[Sample, ...]
    carried: tuple[Sample, ...]
    num_dropped: int
    num_cut_tokens: int
    masked: tuple[int, ...] = ()
    num_passes: int = 1

    @property
    def first_pass(self) -> tuple[StepPlan, ...]:
        """The optimizer steps of the first pass, which trains every response once."""
        return self.plan.steps[: len(self.plan.steps) // self.num_passes]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRules:
    """Holds the rules of every train phase of a run.

    budgets: Phi of each optimizer step; an algorithm without a budget uses only their number and trains every sample.
    micro_batch_multiple: see `pack_micro_batches`.
    shares: of every budget, by the prompt's domain, which `domain_of` gives; see `select_by_domain`. The denominator is
        Phi all the same.
    mask_truncated: samples that ended at the longest response carry no loss; they take their part of a budget, count in
        no other denominator, and are not forwarded.
    num_passes: how often the optimizer steps over the same samples are made.
    """

    algorithm: Algorithm
    budgets: Sequence[int]
    cut: Literal["token", "response"]
    keep_surplus: bool
    max_response_tokens: int
    num_data_ranks: int
    token_cap: int
    cost: CostModel
    micro_batch_multiple: int = 1
    shares: Mapping[str, float] = field(default_factory=lambda: {ANY: 1.0})
    domain_of: Callable[[int], str] = lambda prompt_id: ANY
    mask_truncated: bool = False
    num_passes: int = 1


def schedule(
    groups: Sequence[Group], carried: Sequence[Sample], rules: PlanRules, *, policy_version: int, seed: int
) -> Schedule:
    """Build the plan of one train phase.

    policy_version: the version of the weights that are now trained.
    seed: decides the order of selection.
    """
    groups = sorted(groups, key=lambda group: group.prompt_id)
    samples = (*carried, *(sample for group in groups for sample in group.samples))
    # An agent's response may have no policy token.
    order = [
        index
        for index in selection_order(len(carried), [len(group.samples) for group in groups], seed)
        if samples[index].response.num_policy_tokens
    ]
    selection = _selection(samples, order, rules)
    masked = {i for i in order if rules.mask_truncated and samples[i].response.finish_reason == "length"}
    left = [[pick for pick in picks if pick.index not in masked] for picks in selection.steps]
    of_pass = list(zip(left, rules.budgets, strict=True))
    steps = tuple(
        _step_plan(samples, picks, policy_version if number == 0 else None, budget, rules)
        for number, (picks, budget) in enumerate(of_pass * rules.num_passes)
    )
    surplus = tuple(samples[i] for i in selection.left_over)
    return Schedule(
        plan=Plan(steps=steps),
        samples=samples,
        carried=surplus if rules.keep_surplus else (),
        num_dropped=0 if rules.keep_surplus else len(surplus),
        num_cut_tokens=selection.num_cut_tokens,
        masked=tuple(pick.index for picks in selection.steps for pick in picks if pick.index in masked),
        num_passes=rules.num_passes,
    )


def _selection(samples: Sequence[Sample], order: Sequence[int], rules: PlanRules) -> Selection:
    """Choose the samples of each optimizer step: by the budgets, or all samples in equal parts."""
    lengths = [sample.response.num_policy_tokens for sample in samples]
    if rules.algorithm.uses_budget:
        domains = [rules.domain_of(sample.response.prompt_id) for sample in samples]
        return select_by_domain(lengths, domains, order, rules.budgets, rules.shares, rules.cut)
    picks = [Pick(index=i, num_loss_tokens=lengths[i]) for i in order]
    return Selection(steps=split_evenly(picks, len(rules.budgets)), left_over=(), num_cut_tokens=0)


def _step_plan(
    samples: Sequence[Sample], picks: Sequence[Pick], policy_version: int | None, budget: int, rules: PlanRules
) -> StepPlan:
    """Weigh the picks of one optimizer step and pack their segments into micro-batches.

    policy_version: the version of the weights that the step changes; None where these are no longer those that sampled.
    """
    parts = [_loss_tokens(samples[pick.index].response, pick.num_loss_tokens) for pick in picks]
    scales, denominator = normalise(
        rules.algorithm.normalisation,
        [list(part.values()) for part in parts],
        budget=budget,
        max_response_tokens=rules.max_response_tokens,
    )
    selected = tuple(
        _selected(samples, pick.index, number, count, scale, policy_version)
        for pick, part, of_part in zip(picks, parts, scales, strict=True)
        for (number, count), scale in zip(part.items(), of_part, strict=True)
    )
    micro_batches = pack_micro_batches(
        [one.num_tokens for one in selected],
        rules.num_data_ranks,
        rules.token_cap,
        rules.cost,
        multiple_of=rules.micro_batch_multiple,
    )
    return StepPlan(denominator=denominator, selected=selected, micro_batches=micro_batches)


def _loss_tokens(response: Response, num_loss_tokens: int) -> dict[int, int]:
    """Divide the first policy tokens of a response over its segments. Return the count by segment number; segments with
    none are left out."""
    found, left = {}, num_loss_tokens
    for number, segment in enumerate(response.segments):
        count = min(left, segment.num_policy_tokens)
        if count:
            found[number] = count
        left -= count
    return found


def _selected(
    samples: Sequence[Sample], index: int, number: int, num_loss_tokens: int, scale: float, policy_version: int | None
) -> Selected:
    """Describe the part of one segment in an optimizer step. policy_version: see `_step_plan`."""
    segment = samples[index].response.segments[number]
    num_stale = num_loss_tokens
    if policy_version is not None:
        num_stale = int(np.searchsorted(segment.policy_versions[:num_loss_tokens], policy_version))
    return Selected(
        index=index,
        segment=number,
        num_prompt_tokens=len(segment.prompt_ids),
        num_output_tokens=segment.num_output_tokens_up_to(num_loss_tokens),
        num_loss_tokens=num_loss_tokens,
        loss_scale=scale,
        num_stale_tokens=num_stale,
    )


def split_evenly(picks: Sequence[T], num_steps: int) -> tuple[tuple[T, ...], ...]:
    """Divide the picks into consecutive parts whose sizes differ by at most one."""
    bounds = [round(i * len(picks) / num_steps) for i in range(num_steps + 1)]
    return tuple(tuple(picks[a:b]) for a, b in pairwise(bounds))
