"""A rollout phase: groups until the budget is filled, by the same arithmetic as the sampler's (c3po/budget.py)."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.simulation.decode import Decoded, decode
from megatron_rl.simulation.rates import Rates

# Lengths [n, K] of the groups of the next n prompts.
Take = Callable[[int], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """count: engines of the cluster. slots: responses that each decodes at once."""

    count: int
    slots: int
    rates: Rates

    @property
    def full_speed(self) -> float:
        """Tokens/s of all of them, every slot busy."""
        return self.count * self.rates.full_speed(self.slots)


@dataclass(slots=True)
class OpenGroup:
    """A group of a partial phase. lengths: [K], what its responses will have. done: tokens that each has."""

    lengths: np.ndarray
    done: np.ndarray
    retention: int
    left: int = 0


@dataclass(slots=True, kw_only=True)
class Rolled:
    """What a phase brought.

    groups: of the completed ones, the lengths [K]. unfinished, num_purged: with partial rollouts. num_tokens: that were
    decoded. waves: without partial rollouts, what each asked of every engine.
    """

    groups: list[np.ndarray] = field(default_factory=list)
    unfinished: list[OpenGroup] = field(default_factory=list)
    num_purged: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    waves: list[Decoded] = field(default_factory=list)


def roll_out(engines: Engines, take: Take, need: Shortfall, first_wave: int, max_waves: int) -> Rolled:
    """Waves, each waited for; counts `need` down. ValueError after `max_waves`."""
    found = Rolled()
    for _ in range(max_waves):
        count = need.more_prompts(first_wave)
        if count == 0:
            return found
        groups = take(count)
        _decode_wave(engines, groups, found)
        found.groups += list(groups)
        need.add(count, groups.tolist())
    if need.missing > 0:
        raise ValueError(
            f"{max_waves} waves (budget.max_waves) did not fill the budget; raise rollout.prompts_per_step"
        )
    return found


def _decode_wave(engines: Engines, groups: np.ndarray, found: Rolled) -> None:
    """Whole groups, each to the engine that has the least to do, as the pool gives them out: it does not know lengths."""
    queues = [groups[engine :: engines.count].reshape(-1) for engine in range(min(engines.count, len(groups)))]
    wave = decode(queues, engines.slots, engines.rates.iteration_seconds)
    found.waves.append(wave)
    found.seconds += float((wave.seconds + engines.rates.response_seconds * wave.responses).max())
    found.num_tokens += int(groups.sum())


def roll_out_partially(
    engines: Engines, take: Take, need: Shortfall, resumed: Sequence[OpenGroup], group_size: int, max_retention: int
) -> Rolled:
    """C3PO++: every slot is busy until the completed groups fill the budget. So all engines advance alike, and one
    count of iterations serves for all."""
    found = Rolled()
    now, num_running, serial = 0, 0, 0
    ends: list[tuple[int, int, int]] = []  # iteration, group, response
    opened: dict[int, OpenGroup] = {}
    started_at: dict[int, int] = {}

    def start(group: OpenGroup) -> None:
        nonlocal num_running, serial
        group.left = 0
        for i, (length, done) in enumerate(zip(group.lengths.tolist(), group.done.tolist(), strict=True)):
            if done < length:
                heapq.heappush(ends, (now + length - done, serial, i))
                group.left += 1
        num_running += group.left
        opened[serial], started_at[serial] = group, now
        serial += 1

    for group in resumed:
        start(group)
    num_slots = engines.count * engines.slots
    while need.missing > 0:
        count = need.prompts_to_start(num_running, num_slots, group_size)
        for lengths in take(count) if count else ():
            start(OpenGroup(lengths, np.zeros(len(lengths), np.int64), 0))
        now, number, i = heapq.heappop(ends)
        group = opened[number]
        found.num_tokens += int(group.lengths[i] - group.done[i])
        group.done[i] = group.lengths[i]
        group.left -= 1
        num_running -= 1
        if group.left == 0:
            found.groups.append(group.lengths)
            need.add(1, [group.lengths.tolist()])
            del opened[number]
    for number, group in opened.items():
        advanced = np.minimum(group.done + now - started_at[number], group.lengths)
        advanced = np.where(group.done == group.lengths, group.done, advanced)
        found.num_tokens += int((advanced - group.done).sum())
        left = OpenGroup(group.lengths, advanced, group.retention + 1)
        if left.retention <= max_retention:
            found.unfinished.append(left)
        else:
            found.num_purged += 1
    per_iteration = float(engines.rates.iteration_seconds(np.array([engines.slots]))[0])
    found.seconds = now * per_iteration
    return found
