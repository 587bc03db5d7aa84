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


@dataclass(slots=True, kw_only=True)
class Shortfall:
    """What a rollout phase still lacks, and how many prompts should be sampled for it. The sampler only asks.

    unit: what is counted; responses' tokens for a budget, whole groups otherwise.
    missing: in that unit; at most 0 when nothing is missing.
    per_prompt: what one prompt is expected to bring, filtered groups counted as nothing; None before anything is known.
        It becomes the mean over the phase as waves are added.
    """

    unit: Literal["tokens", "groups"]
    missing: float
    per_prompt: float | None
    _gained: float = 0.0
    _num_prompts: int = 0

    def more_prompts(self, first_wave: int) -> int:
        """Prompts of the next wave; `first_wave` while nothing is known.

        Tokens get one group more than the expectation: a second wave of a few prompts leaves most decoding slots idle
        and costs more than the surplus, which the next step uses first.
        """
        if self.missing <= 0:
            return 0
        if self.per_prompt is None:
            return first_wave
        return math.ceil(self.missing / self.per_prompt) + (self.unit == "tokens")

    def prompts_to_start(self, num_running: int, num_slots: int, samples_per_prompt: int) -> int:
        """Prompts to start beside `num_running` responses, where unfinished responses outlive the phase (C3PO++): as
        many as keep every decoding slot busy until nothing is missing."""
        if self.missing <= 0:
            return 0
        return max(0, math.ceil((num_slots - num_running) / samples_per_prompt))

    def add(self, num_prompts: int, kept_lengths: Sequence[Sequence[int]]) -> None:
        """Count a wave of `num_prompts` prompts; kept_lengths: response tokens of each group that was kept."""
        gained = sum(map(sum, kept_lengths)) if self.unit == "tokens" else len(kept_lengths)
        self.missing -= gained
        self._gained += gained
        self._num_prompts += num_prompts
        if self._gained:  # before anything was kept there is nothing to plan by
            self.per_prompt = self._gained / self._num_prompts
