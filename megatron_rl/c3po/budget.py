"""This module is the token budget: it decides which response tokens an optimizer step trains on, and how much must be
sampled for it.

Eq. 3 of the paper selects greedily: whole responses until the running token count reaches Phi. With `cut = "token"`
the tail of the response that crosses Phi is masked, so that exactly Phi tokens carry loss.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple

# Weight of past phases in what the next is expected to bring: the policy changes, but one phase is a small sample.
_DECAY = 0.8

ANY = ""  # stands for every domain, where domains have no budgets of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Names a response taken into an optimizer step: its position in the candidate list, and its tokens that carry
    loss."""

    index: int
    num_loss_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Divides the candidates: each is in exactly one of `steps` or `left_over`.

    steps: per optimizer step the picks in order.
    left_over: candidates that no step took, in order.
    num_cut_tokens: tokens of picked responses that carry no loss.
    """

    steps: tuple[tuple[Pick, ...], ...]
    left_over: tuple[int, ...]
    num_cut_tokens: int


def selection_order(num_carried: int, group_sizes: Sequence[int], seed: int) -> list[int]:
    """Return the order in which the greedy selection takes candidates. These are listed carried first, then group by
    group.

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
    """Select by Eq. 3 for each optimizer step in turn.

    lengths: tokens of every candidate response, each at least 1.
    order: a permutation of the candidates; nothing is skipped, since skipping what does not fit prefers short ones.
    budgets: Phi of each optimizer step. The last steps stay short when the candidates run out.
    """
    ordered = [lengths[index] for index in order]
    steps, num_cut, taken = [], 0, 0
    for start, stop, beyond in fill(ordered, budgets):
        picks = [Pick(index=order[i], num_loss_tokens=ordered[i]) for i in range(start, stop)]
        if beyond and cut == "token":
            picks[-1] = Pick(index=order[stop - 1], num_loss_tokens=ordered[stop - 1] - beyond)
            num_cut += beyond
        steps.append(tuple(picks))
        taken = stop
    return Selection(steps=tuple(steps), left_over=tuple(order[taken:]), num_cut_tokens=num_cut)


def fill(ordered: Sequence[int], budgets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Fill budgets by Eq. 3 with lengths in order. Return for each optimizer step its part [start, stop) of them, and
    how many tokens the last of these has beyond the budget."""
    ends = list(accumulate(ordered))
    parts, stop, done = [], 0, 0
    for budget in budgets:
        start, limit = stop, done + budget
        if budget > 0:  # a domain's part of a small budget may be nothing
            stop = min(bisect_left(ends, limit, start) + 1, len(ends))
        done = ends[stop - 1] if stop else 0
        parts.append((start, stop, max(0, done - limit)))
    return parts


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` into whole parts by largest remainders. What rounding down leaves goes to the parts that lost most
    by it, among equal ones to the first name.

    shares: by name; they sum to 1, to within the rounding of floats. They count as the decimals that they are written
    as, so 0.29 of 100 is 29.
    """
    exact = {name: Fraction(str(share)) for name, share in shares.items()}
    quotas = {name: total * share / sum(exact.values()) for name, share in exact.items()}
    parts = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(shares, key=lambda name: (parts[name] - quotas[name], name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def select_by_domain(
    lengths: Sequence[int],
    domains: Sequence[str],
    order: Sequence[int],
    budgets: Sequence[int],
    shares: Mapping[str, float],
    cut: Literal["token", "response"] = "token",
) -> Selection:
    """Run `select` for every domain by itself, with its part of each budget.

    domains: of every candidate, each of them in `shares`. The other arguments are those of `select` and `apportion`.
    """
    parts = [apportion(budget, shares) for budget in budgets]
    found = [
        select(lengths, [i for i in order if domains[i] == domain], [part[domain] for part in parts], cut)
        for domain in shares
    ]
    place = {index: n for n, index in enumerate(order)}
    together = ([pick for one in found for pick in one.steps[step]] for step in range(len(budgets)))
    return Selection(
        steps=tuple(tuple(sorted(picks, key=lambda pick: place[pick.index])) for picks in together),
        left_over=tuple(sorted((i for one in found for i in one.left_over), key=place.__getitem__)),
        num_cut_tokens=sum(one.num_cut_tokens for one in found),
    )


class PromptYield(NamedTuple):
    """Sums up what prompts brought, in the unit of a `Shortfall`; a filtered group brings nothing. The sums are over
    the prompts of a phase and, with ever smaller weights, of the phases before it."""

    num_prompts: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.total > 0

    @property
    def mean(self) -> float:
        return self.total / self.num_prompts

    @property
    def deviation(self) -> float:
        """The standard deviation of what one prompt brings."""
        return math.sqrt(max(0.0, self.squares / self.num_prompts - self.mean**2))

    def add(self, num_prompts: int, brought: Sequence[int]) -> "PromptYield":
        """Add prompts. brought: by each of them that brought something."""
        squares = self.squares + sum(n * n for n in brought)
        return PromptYield(self.num_prompts + num_prompts, self.total + sum(brought), squares)

    def decayed(self) -> "PromptYield":
        """Return the sums with their weights in the next phase."""
        return PromptYield(*(_DECAY * number for number in self))


NOTHING_KNOWN = PromptYield()


@dataclass(slots=True, kw_only=True)
class Shortfall:
    """Tracks what a rollout phase still lacks, and says how many prompts to sample for it. The sampler only asks.

    domain: whose prompts can bring it; ANY is every prompt's.
    unit: what is counted; responses' tokens for a budget, whole groups otherwise.
    missing: in that unit; at most 0 when nothing is missing.
    margin: standard deviations by which more is sampled than is expected to do.
    per_prompt: what prompts bring; those of the phase are counted as waves are added.
    """

    unit: Literal["tokens", "groups"]
    missing: float
    margin: float = 0.0
    per_prompt: PromptYield = NOTHING_KNOWN
    domain: str = ANY

    def more_prompts(self, first_wave: int) -> int:
        """Return the number of prompts in the next wave; `first_wave` while nothing is known.

        n prompts bring n mean ± sqrt(n) deviation. The wave is the smallest n that is enough even when it brings
        `margin` deviations less than the mean.
        """
        if self.missing <= 0:
            return 0
        if not self.per_prompt.is_known:
            return first_wave
        mean, spread = self.per_prompt.mean, self.margin * self.per_prompt.deviation
        root = (spread + math.sqrt(spread * spread + 4 * mean * self.missing)) / (2 * mean)
        return math.ceil(root * root - 1e-9)  # a whole number may come out a rounding above itself

    def prompts_to_start(self, num_running: int, num_slots: int, samples_per_prompt: int) -> int:
        """Return how many prompts to start beside `num_running` responses, where unfinished responses outlive the phase
        (C3PO++). They are as many as keep every decoding slot busy until nothing is missing."""
        if self.missing <= 0:
            return 0
        return max(0, math.ceil((num_slots - num_running) / samples_per_prompt))

    def add(self, num_prompts: int, kept_lengths: Sequence[Sequence[int]]) -> None:
        """Count a wave of `num_prompts` prompts; kept_lengths: response tokens of each group that was kept."""
        brought = [sum(lengths) if self.unit == "tokens" else 1 for lengths in kept_lengths]
        self.missing -= sum(brought)
        self.per_prompt = self.per_prompt.add(num_prompts, brought)


def shortfalls(
    budgets: Sequence[int],
    shares: Mapping[str, float],
    carried: Mapping[str, int],
    per_prompt: Mapping[str, PromptYield],
    longest: int,
    margin: float,
) -> list[Shortfall]:
    """List what a phase lacks of every domain so that `select_by_domain` can fill its part of all budgets.

    carried: tokens that are there already. per_prompt: what prompts brought up to the last phase. Both are by domain,
    as shares are. longest: tokens of the longest response. margin: see `Shortfall`.
    """
    # A response that crosses the budget of one optimizer step leaves fewer tokens for the next.
    spare = (len(budgets) - 1) * (longest - 1)
    parts = [apportion(budget, shares) for budget in budgets]
    return [
        Shortfall(
            unit="tokens",
            domain=domain,
            missing=sum(part[domain] for part in parts) + spare - carried.get(domain, 0),
            margin=margin,
            per_prompt=per_prompt[domain].decayed(),
        )
        for domain in shares
    ]


def most_lacking(needs: Sequence[Shortfall], num_open: Mapping[str, int]) -> Shortfall:
    """Return the shortfall whose open prompts are expected to bring the smallest part of what it lacks.

    needs: all of them lack something. num_open: by domain, prompts that are being sampled.
    """
    # Before all are known, the known ones cannot be compared with the others but by number.
    are_known = all(need.per_prompt.is_known for need in needs)
    return min(
        needs, key=lambda need: num_open[need.domain] * (need.per_prompt.mean if are_known else 1) / need.missing
    )
