"""Watches a run for trouble: steps that had to be skipped, gradients that jump, rewards that collapse."""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from megatron_rl.config.train import TrainSection
from megatron_rl.errors import SharedFault
from megatron_rl.train.run.learning import AGAIN_STEPS, NO_LEARNING, SLOW, STEPS, Signs

if TYPE_CHECKING:  # `megatron-rl status` looks for alarms without torch
    from megatron_rl.train.step.trainer import StepResult

log = logging.getLogger(__name__)

_GRADIENTS, _FEWEST_GRADIENTS = 50, 10
_REWARDS = 10
# Less than this above the least the best mean reward so far is too near to it for a share of that to mean anything.
_LEAST_REWARD = 0.05


class SkipGuard:
    """Counts optimizer steps that were skipped one after the other. It runs on every rank, and counts the same on
    all."""

    def __init__(self, section: TrainSection, hint: str) -> None:
        """Start counting at 0. hint: a sentence for the message."""
        self._limit, self._hint = section.max_skipped_steps, hint
        self._in_a_row = 0

    def check(self, results: "Sequence[StepResult]") -> None:
        """Count the steps of these results. Raise SharedFault when more than `train.max_skipped_steps` in a row were
        skipped."""
        for result in results:
            self._in_a_row = self._in_a_row + 1 if result.skipped else 0
            if self._in_a_row > self._limit:
                raise SharedFault(
                    f"{self._in_a_row} optimizer steps in a row had a loss or gradient that is not finite (loss "
                    f"{result.metrics['loss']:g}, gradient norm {result.grad_norm:g}); train.max_skipped_steps allows "
                    f"{self._limit}. The weights are those before them. {self._hint}Lower "
                    "optimizer.learning_rate, or start again from an earlier checkpoint"
                )


class Alarms:
    """Reports what looks wrong in a run's metrics. Nothing stops: a person has to look.

    `check` is given every row; in a run that is resumed, those of the steps before too.
    """

    def __init__(self, section: TrainSection) -> None:
        self._section = section
        self._gradients: deque[float] = deque(maxlen=_GRADIENTS)
        self._rewards: deque[float] = deque(maxlen=_REWARDS)
        self._signs, self._slow = Signs(NO_LEARNING), Signs(SLOW)
        # The best mean of ten steps, and what it is measured from: 0, or the lowest reward of a step that was below.
        self._best, self._floor = -math.inf, 0.0
        self._low_steps = 0
        self._learns_nothing = False

    def report(self, row: dict[str, Any], examples: Sequence[str] = ()) -> None:
        """Log what is wrong with the row of a new step, and count it in the row. examples: responses of the step, told
        where the run learns nothing."""
        found = self.check(row)
        for message in found:
            log.warning("step %d: %s", row["step"], message)
        if found and examples and self._learns_nothing:
            log.warning("step %d: for example %s", row["step"], "\n  and ".join(examples))
        row["num_alarms"] = len(found)

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """Check the row of a new step. Return messages, in most cases none."""
        found = []
        norm = row["grad_norm"]
        if norm is not None and math.isfinite(norm):
            usual = median(self._gradients) if len(self._gradients) >= _FEWEST_GRADIENTS else math.inf
            if norm > self._section.grad_norm_alarm * usual:
                found.append(f"the gradient norm {norm:.3g} is far above the usual {usual:.3g}")
            self._gradients.append(norm)
        found += self._slow.check(row)
        told = self._signs.check(row)
        if self._section.reward_alarm and "reward" in row:
            told += self._collapse(row["reward"])
        self._learns_nothing = bool(told)
        return found + told

    def _collapse(self, reward: float) -> list[str]:
        """Compare the reward of a new step with the best mean of ten steps before."""
        self._floor = min(self._floor, reward)
        climbed = self._best - self._floor
        limit = self._floor + self._section.reward_alarm * climbed if climbed >= _LEAST_REWARD else -math.inf
        self._low_steps = self._low_steps + 1 if reward < limit else 0
        self._rewards.append(reward)
        if len(self._rewards) == _REWARDS:
            self._best = max(self._best, fmean(self._rewards))
        if self._low_steps % AGAIN_STEPS != STEPS:
            return []
        return [
            f"the reward has been below {limit:.3g} for {STEPS} steps or more, now {reward:.3g}, and its best mean of "
            f"{_REWARDS} steps was {self._best:.3g}. Likely: the policy has collapsed (lower optimizer.learning_rate, "
            "go back to an earlier checkpoint); or the data has become harder (data.stages)"
        ]
