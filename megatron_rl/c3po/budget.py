"""The token budget: which response tokens an optimizer step trains on, and how much must be sampled for it.

Eq. 3 of the paper selects greedily: whole responses until the running token count reaches Phi. With `cut = "token"`
the tail of the response that crosses Phi is masked, so that exactly Phi tokens carry loss.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A response taken into an optimizer step: position in the candidate list, and tokens that carry loss."""

    index: int
    num_loss_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Every candidate is in exactly one of `steps` or `left_over`.

    steps: per optimizer step the picks in order.
    left_over: candidates that no step took, in order.
    num_cut_tokens: tokens of picked responses that carry no loss.
    """

    steps: tuple[tuple[Pick, ...], ...]
    left_over: tuple[int, ...]
    num_cut_tokens: int


def selection_order(num_carried: int, group_sizes: Sequence[int], seed: int) -> list[int]:
    """Order of the greedy selection over candidates that are listed carried first, then group by group.

    Carried responses come first, in their order; then the groups in a seeded permutation, each whole. Neither arrival
    nor length has a say: both would prefer short responses.
    """
    starts = [num_carried]
    for size in group_sizes:
        starts.append(starts[-1] + size)
    groups = list(range(len(group_sizes)))
    random.Random(seed).shuffle(groups)
    order = list(range(num_carried))
    for group in groups:
        order.extend(range(starts[group], starts[group + 1]))
    return order


def select(
    lengths: Sequence[int], order: Sequence[int], budgets: Sequence[int], cut: Literal["token", "response"] = "token"
) -> Selection:
    """Eq. 3 for each optimizer step in turn.

    lengths: tokens of every candidate response, each at least 1.
    order: a permutation of the candidates; nothing is skipped, since skipping what does not fit prefers short ones.
    budgets: Phi of each optimizer step. The last steps stay short when the candidates run out.
    """
    steps: list[tuple[Pick, ...]] = []
    remaining = list(order)
    num_cut = 0
    for budget in budgets:
        picks: list[Pick] = []
        missing = budget
        taken = 0
        for index in remaining:
            if missing <= 0:
                break
            tokens = min(lengths[index], missing) if cut == "token" else lengths[index]
            num_cut += lengths[index] - tokens
            missing -= tokens
            taken += 1
            picks.append(Pick(index=index, num_loss_tokens=tokens))
        remaining = remaining[taken:]
        steps.append(tuple(picks))
    return Selection(steps=tuple(steps), left_over=tuple(remaining), num_cut_tokens=num_cut)


def prompts_to_sample(missing_tokens: int, mean_response_tokens: float, group_size: int) -> int:
    """How many more prompts, of `group_size` responses each, a rollout phase should sample to fill its budget.

    One group more than the expectation: a second wave of a few prompts leaves most decoding slots idle and costs more
    than the surplus, which the next step uses first.
    """
    if missing_tokens <= 0:
        return 0
    return math.ceil(missing_tokens / (max(mean_response_tokens, 1.0) * group_size)) + 1
