"""This module tries reward functions of the user's own, and services, on a row before anything is built."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rl.config.data import PromptSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.reward import OF_BENCHMARKS, RewardSection
from megatron_rl.config.schema import RlConfig, SamplingConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.prompts import Prompt, read_prompts
from megatron_rl.data.rows import LOOKED_AT, Problems
from megatron_rl.preflight.registry import Start
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import GAVE_UP, Verdict

# The reference answer, which may be right, and nothing, which a model may well answer.
_TRIED = ("\\boxed{%s}", "")
_PROGRAMS = ("```python\nprint()\n```", "")
_ANSWER_CHARACTERS = 2000


def reward_problems(start: Start) -> Iterator[str]:
    """Yield the problems of the functions and services with the first row that each has to judge."""
    config = start.config
    if start.rollouts is not None:
        return
    if isinstance(config, EvaluateConfig | RlConfig):
        for section in start.benchmarks.values():
            reward = section.reward_of(config.reward)
            if _is_own(reward):
                yield from _tried(reward, _first_rows([section.path], section, reward), None)
    if isinstance(config, SamplingConfig | SelectConfig) and _is_own(config.reward):
        yield from _tried(
            config.reward, _first_rows(config.data.train_files, config.data, config.reward), config.run_dir
        )


def _first_rows(paths: Sequence[Path], how: PromptSection, reward: RewardSection) -> list[Prompt]:
    """Read the first rows of files. Another check reports what is wrong with them."""
    return [
        row
        for path in paths
        for row in read_prompts(
            path, how.domain, how.suffix, Problems(), LOOKED_AT, True, how.system, reward.needs_answers
        )
    ]


def _is_own(reward: RewardSection) -> bool:
    return any(kind not in OF_BENCHMARKS for kind in reward.kinds)


def _tried(reward: RewardSection, rows: Sequence[Prompt], folder: Path | None) -> Iterator[str]:
    """Judge two responses to the first row of each domain that has a function or service."""
    own = [row for row in rows if any(kind not in OF_BENCHMARKS for kind in reward.kinds_of(row.domain))]
    for row, text, verdict in first_verdicts(reward, own, folder):
        yield from given_up(reward, row, text, verdict)


def first_verdicts(
    reward: RewardSection, rows: Sequence[Prompt], folder: Path | None
) -> Iterator[tuple[Prompt, str, Verdict]]:
    """Judge two responses to the first row of each domain: the reference answer, or for programs one that does nothing
    of what is asked, and an empty one. Yield row, response and verdict."""
    firsts = {row.domain: row for row in reversed(rows)}
    with Rewards(reward, folder) as rewards:
        for row in firsts.values():
            forms = _PROGRAMS if "code" in reward.kinds_of(row.domain) else _TRIED
            texts = [form.replace("%s", row.answer[:_ANSWER_CHARACTERS]) for form in forms]
            attempts = [Attempt(text=text, num_tokens=len(text) + 1) for text in texts]
            for text, verdict in zip(texts, asyncio.run(rewards.verdicts(row, attempts)), strict=True):
                yield row, text, verdict


def given_up(reward: RewardSection, row: Prompt, text: str, verdict: Verdict) -> Iterator[str]:
    """Yield a problem where a response got no score."""
    if verdict.reason in GAVE_UP:
        yield (
            f"the reward {' + '.join(reward.kinds_of(row.domain))} gives no score to the response {text!r:.80} to the "
            f"row {row.where or row.id}: {verdict.details}; mend it, or the row"
        )
