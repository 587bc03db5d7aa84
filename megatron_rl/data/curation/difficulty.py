"""Reads from what `megatron-rl rollout` wrote how often models solved a prompt, and says which prompts that rules
out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.curation.config import DifficultySection
from megatron_rl.data.curation.sources import files_of, numbered_lines
from megatron_rl.data.curation.text import short_digest
from megatron_rl.parsing import parse_json
from megatron_rl.reward.verdict import GAVE_UP

# By the digest of the prompt as it stands: (responses that solve it, responses).
Rates = Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """Holds how often models solved each prompt. stronger: None without rollouts of a stronger model."""

    settings: DifficultySection
    model: Rates
    stronger: Rates | None

    def judge(self, prompt: int) -> tuple[str, dict[str, Any]] | None:
        """Return reason and details for dropping the prompt of this digest, or None.

        too_easy: the model solves it always, or max_pass_rate of the time. too_hard: neither the model nor the stronger
        one does more than min_pass_rate of the time; with a stronger model, only if that was measured as well.
        """
        if prompt not in self.model:
            return ("unmeasured", {}) if self.settings.unmeasured == "drop" else None
        solved, total = self.model[prompt]
        details: dict[str, Any] = {"pass_rate": round(solved / total, 4), "num_responses": total}
        if solved >= self.settings.max_pass_rate * total:
            return "too_easy", details
        if solved > self.settings.min_pass_rate * total:
            return None
        if self.stronger is None:
            return "too_hard", details
        if prompt not in self.stronger:
            return None
        solved, total = self.stronger[prompt]
        details |= {"stronger_pass_rate": round(solved / total, 4), "stronger_num_responses": total}
        return ("too_hard", details) if solved <= self.settings.min_pass_rate * total else None


def read_difficulty(settings: DifficultySection) -> Difficulty | None:
    """Read the rollouts; None without any. ValueError names a line that is no scored response."""
    if not settings.rollouts:
        return None
    model, stronger = (_rates(paths, settings) for paths in (settings.rollouts, settings.stronger))
    return Difficulty(settings=settings, model=model, stronger=stronger if settings.stronger else None)


def _rates(patterns: Iterable[str], settings: DifficultySection) -> Rates:
    rates: dict[int, tuple[int, int]] = {}
    for path in (path for pattern in patterns for path in files_of(pattern)):
        for number, line in numbered_lines(path):
            try:
                row = parse_json(line)
                key, reward = short_digest(row["prompt"].removesuffix(settings.suffix)), float(row["reward"])
                reason = row.get("reason")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number} is not a scored response ({type(error).__name__}: {error}); "
                    "difficulty takes what megatron-rl rollout writes"
                ) from None
            if reason in GAVE_UP:  # scored 0, though nobody knows whether it solves the prompt
                continue
            solved, total = rates.get(key, (0, 0))
            rates[key] = solved + _is_solved(reward, reason, settings.passing_reward), total + 1
    return rates


def _is_solved(reward: float, reason: str | None, passing_reward: float | None) -> bool:
    if passing_reward is None and reason is not None:
        return reason == "correct"
    return reward >= (1.0 if passing_reward is None else passing_reward)
