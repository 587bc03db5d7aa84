"""This module simulates a rollout phase: groups until the budget is filled, by the same arithmetic as the sampler's
(c3po/budget.py)."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.config.schema import RlConfig
from megatron_rl.simulation.decode import Decoded, decode
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.workload import Take


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Describes the engines of the cluster. count: their number. slots: the responses that each decodes at once."""

    count: int
    slots: int
    rates: Rates

    @property
    def full_speed(self) -> float:
        """The tokens/s of all of them, with every slot busy."""
        return self.count * self.rates.full_speed(self.slots)


@dataclass(slots=True, kw_only=True)
class OpenGroup:
    """Holds a group of a partial phase. lengths: [K], what its responses will have. done: [K], tokens that each has.
    num_running: responses that have not ended. since: the iteration of the phase in which it went on."""

    lengths: np.ndarray
    done: np.ndarray
    kept: bool
    retention: int = 0
    num_running: int = 0
    since: int = 0

    def advance(self, now: int) -> int:
        """Advance the group to iteration `now` of the phase. Return the tokens that this brought."""
        done = np.minimum(self.done + now - self.since, self.lengths)
        gained = int((done - self.done).sum())
        self.done, self.since = done, now
        return gained


@dataclass(slots=True, kw_only=True)
class Rolled:
    """Holds what a phase brought.

    kept: lengths [K] of the groups that may be trained. unfinished, num_purged: with partial rollouts. num_tokens:
    those that were decoded. num_responses: those that ended. waves: without partial rollouts, what each asked of every
    engine.
    """

    kept: list[np.ndarray] = field(default_factory=list)
    unfinished: list[OpenGroup] = field(default_factory=list)
    num_purged: int = 0
    num_tokens: int = 0
    num_responses: int = 0
    seconds: float = 0.0
    waves: list[Decoded] = field(default_factory=list)


def roll_out_phase(
    config: RlConfig, engines: Engines, take: Take, need: Shortfall, unfinished: Sequence[OpenGroup], filters: bool
) -> Rolled:
    """Simulate a phase as the configuration has it, of waves or by C3PO++. unfinished: what the phase before left."""
    rollout = config.rollout
    if rollout.partial:
        size, retention = rollout.samples_per_prompt, rollout.max_retention
        return roll_out_partially(engines, take, need, unfinished, size, retention, filters)
    return roll_out(engines, take, need, rollout.prompts_per_step, config.budget.max_waves, filters)


def roll_out(engines: Engines, take: Take, need: Shortfall, first_wave: int, max_waves: int, filters: bool) -> Rolled:
    """Simulate a phase of waves, each waited for; count `need` down. filters: drop groups whose rewards are equal.
    ValueError after `max_waves`."""
    found = Rolled()
    for _ in range(max_waves):
        count = need.more_prompts(first_wave)
        if count == 0:
            return found
        groups = take(count)
        _decode_wave(engines, groups.lengths, found)
        kept = groups.lengths[groups.kept] if filters else groups.lengths
        found.kept += list(kept)
        need.add(count, kept.tolist())
    if need.missing > 0:
        raise ValueError(
            f"{max_waves} waves (budget.max_waves) did not fill the budget; raise rollout.prompts_per_step"
        )
    return found


def _decode_wave(engines: Engines, lengths: np.ndarray, found: Rolled) -> None:
    """Decode whole groups, dealt to the engines in turn as the pool does, which does not know their lengths."""
    queues = [lengths[engine :: engines.count].reshape(-1) for engine in range(min(engines.count, len(lengths)))]
    wave = decode(queues, engines.slots, engines.rates.iteration_seconds)
    found.waves.append(wave)
    found.seconds += float((wave.seconds + engines.rates.response_seconds * wave.responses).max())
    found.num_tokens += int(lengths.sum())
    found.num_responses += lengths.size


def roll_out_partially(
    engines: Engines,
    take: Take,
    need: Shortfall,
    resumed: Sequence[OpenGroup],
    group_size: int,
    max_retention: int,
    filters: bool,
) -> Rolled:
    """Simulate a phase of C3PO++: every slot is busy until the completed groups fill the budget. So all engines advance
    alike, and one count of iterations is enough."""
    found = Rolled()
    now, num_running, num_ended, serial = 0, 0, 0, 0
    ends: list[tuple[int, int]] = []  # iteration in which a response ends, its group
    opened: dict[int, OpenGroup] = {}

    def start(group: OpenGroup) -> None:
        nonlocal num_running, serial
        left = group.lengths - group.done
        for tokens in left[left > 0].tolist():
            heapq.heappush(ends, (now + tokens, serial))
        group.num_running, group.since = int((left > 0).sum()), now
        num_running += group.num_running
        opened[serial] = group
        serial += 1

    for group in resumed:
        start(group)
    while need.missing > 0:
        count = need.prompts_to_start(num_running, engines.count * engines.slots, group_size)
        if count:
            new = take(count)
            for lengths, kept in zip(new.lengths, new.kept.tolist(), strict=True):
                start(OpenGroup(lengths=lengths, done=np.zeros_like(lengths), kept=kept or not filters))
        now, number = heapq.heappop(ends)
        num_running, num_ended = num_running - 1, num_ended + 1
        group = opened[number]
        group.num_running -= 1
        if group.num_running == 0:
            found.num_tokens += group.advance(now)
            if group.kept:
                found.kept.append(group.lengths)
            need.add(1, [group.lengths.tolist()] if group.kept else [])
            del opened[number]
    for group in opened.values():
        found.num_tokens += group.advance(now)
        group.retention += 1
        if group.retention <= max_retention:
            found.unfinished.append(group)
        else:
            found.num_purged += 1
    iteration = float(engines.rates.iteration_seconds(np.array([engines.slots]))[0])
    found.num_responses = num_ended
    found.seconds = now * iteration + engines.rates.response_seconds * num_ended / engines.count
    return found
