"""Scored samples in, a plan for one train phase out. Pure: the same arguments give the same plan on any machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

from megatron_rl.c3po.algorithms import Algorithm, normalise
from megatron_rl.c3po.budget import ANY, Pick, select_by_domain, selection_order
from megatron_rl.c3po.packing import CostModel, pack_micro_batches
from megatron_rl.records import Group, Plan, Sample, Selected, StepPlan

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A plan over `samples`, and where the samples that it does not use go.

    samples: carried first, then group by group; `Selected.index` points here.
    carried: surplus for the next step, in order.
    num_dropped: surplus that the algorithm throws away.
    num_cut_tokens: tokens of trained responses that carry no loss.
    """

    plan: Plan
    samples: tuple[Sample, ...]
    carried: tuple[Sample, ...]
    num_dropped: int
    num_cut_tokens: int


def schedule(
    groups: Sequence[Group],
    carried: Sequence[Sample],
    *,
    algorithm: Algorithm,
    budgets: Sequence[int],
    cut: Literal["token", "response"],
    keep_surplus: bool,
    max_response_tokens: int,
    policy_version: int,
    seed: int,
    num_data_ranks: int,
    token_cap: int,
    cost: CostModel,
    micro_batch_multiple: int = 1,
    shares: Mapping[str, float] | None = None,
    domain_of: Callable[[int], str] = lambda prompt_id: ANY,
) -> Schedule:
    """Build the plan of one train phase.

    budgets: Phi of each optimizer step; an algorithm without a budget uses only their number and trains every sample.
    policy_version: of the weights now being trained.
    seed: decides the order of selection.
    micro_batch_multiple: see `pack_micro_batches`.
    shares: of every budget, by the prompt's domain, which `domain_of` gives; see `select_by_domain`. The denominator is
        Phi all the same.
    """
    groups = sorted(groups, key=lambda group: group.prompt_id)
    samples = (*carried, *(sample for group in groups for sample in group.samples))
    lengths = [sample.response.num_output_tokens for sample in samples]
    order = selection_order(len(carried), [len(group.samples) for group in groups], seed)
    if algorithm.uses_budget:
        domains = [domain_of(sample.response.prompt_id) for sample in samples]
        selection = select_by_domain(lengths, domains, order, budgets, shares or {ANY: 1.0}, cut)
        per_step, left_over, num_cut = selection.steps, selection.left_over, selection.num_cut_tokens
    else:
        per_step = split_evenly([Pick(index=i, num_loss_tokens=lengths[i]) for i in order], len(budgets))
        left_over, num_cut = (), 0

    steps = []
    for step, (picks, budget) in enumerate(zip(per_step, budgets, strict=True)):
        scales, denominator = normalise(
            algorithm.normalisation,
            [pick.num_loss_tokens for pick in picks],
            budget=budget,
            max_response_tokens=max_response_tokens,
        )
        selected = tuple(
            Selected(
                index=pick.index,
                num_prompt_tokens=len(samples[pick.index].response.prompt_ids),
                num_loss_tokens=pick.num_loss_tokens,
                loss_scale=scale,
                # From the second optimizer step of a phase on, the weights are no longer those that sampled.
                num_stale_tokens=_num_older(samples[pick.index], policy_version, pick.num_loss_tokens)
                if step == 0
                else pick.num_loss_tokens,
            )
            for pick, scale in zip(picks, scales, strict=True)
        )
        steps.append(
            StepPlan(
                denominator=denominator,
                selected=selected,
                micro_batches=pack_micro_batches(
                    [s.num_tokens for s in selected], num_data_ranks, token_cap, cost, multiple_of=micro_batch_multiple
                ),
            )
        )
    surplus = tuple(samples[i] for i in left_over)
    return Schedule(
        plan=Plan(steps=tuple(steps)),
        samples=samples,
        carried=surplus if keep_surplus else (),
        num_dropped=0 if keep_surplus else len(surplus),
        num_cut_tokens=num_cut,
    )


def _num_older(sample: Sample, policy_version: int, num_tokens: int) -> int:
    """How many of its first `num_tokens` tokens weights before `policy_version` sampled."""
    return int(np.searchsorted(sample.response.policy_versions[:num_tokens], policy_version))


def split_evenly(picks: Sequence[T], num_steps: int) -> tuple[tuple[T, ...], ...]:
    """Consecutive parts of sizes that differ by one at most."""
    bounds = [round(i * len(picks) / num_steps) for i in range(num_steps + 1)]
    return tuple(tuple(picks[a:b]) for a, b in pairwise(bounds))
