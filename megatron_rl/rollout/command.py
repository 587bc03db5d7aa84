"""`megatron-rl rollout`: sample and score prompts, and write down the responses."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import RolloutPhase, SamplingConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.mixture import load_stream
from megatron_rl.rollout.recorded import group_rows
from megatron_rl.rollout.resumable import sample_into, whole_groups
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.settings import (
    ANOTHER_OUTPUT,
    model_settings,
    read_settings,
    refuse_differences,
    reward_settings,
    write_settings,
)
from megatron_rl.rollout.standalone import sampling

log = logging.getLogger(__name__)


def run_rollout(config: SamplingConfig, model: Path, num_prompts: int, path: Path, resume: bool) -> int:
    """The first `num_prompts` prompts of the run's order, each sampled rollout.samples_per_prompt times by `model`.
    Returns the exit code."""
    if path.exists() and not resume:
        raise ValueError(f"{path} exists; add --resume to go on with it, or name another with --output")
    asyncio.run(_rollout(config, model, num_prompts, path))
    return 0


async def _rollout(config: SamplingConfig, model: Path, num_prompts: int, path: Path) -> None:
    tokenizer = load_tokenizer(model)
    stream = load_stream(config.data, config.seed)
    input_ids = rendered_prompts(stream.rows, tokenizer, config.rollout.max_prompt_tokens, "data.train")
    done = claim(path, sampling_settings(config, model, stream.digest), config.rollout.samples_per_prompt)
    taken, _ = stream.take(0, num_prompts)
    questions = [
        Question(prompt_id=position, prompt=prompt, input_ids=input_ids[prompt.id])
        for position, prompt in enumerate(taken)
        if position not in done
    ]
    await sample_questions(config, model, tokenizer, questions, path, "rollout_server")
    num_groups = len(done) + len(questions)
    log.info("%s: %d groups of %d responses", path, num_groups, config.rollout.samples_per_prompt)


async def sample_questions(
    config: RolloutPhase, model: Path, tokenizer: Any, questions: Sequence[Question], path: Path, server: str
) -> None:
    """Append every question's scored group to `path`. server: what the logs of the servers are called after."""
    async with sampling(config, model, tokenizer, server, config.seed) as sampler:
        await sample_into(
            *(path, sampler, questions),
            lambda question, group: group_rows(group, question.prompt, tokenizer.decode),
            "prompts",
        )


def sampling_settings(config: RolloutPhase, model: Path, digest: str) -> dict[str, Any]:
    """What the responses depend on. Not among them: how fast it goes, and how many prompts are taken, since more can
    follow. digest: of the prompts in their order."""
    rollout = config.rollout
    return {
        "model": model_settings(model, config.model.dtype),
        "seed": config.seed,
        "rollout": {
            "engine": rollout.engine,
            "samples_per_prompt": rollout.samples_per_prompt,
            "temperature": rollout.temperature,
            "max_prompt_tokens": rollout.max_prompt_tokens,
            "max_response_tokens": rollout.max_response_tokens,
        },
        "reward": reward_settings(config.reward),
        "data": {"digest": digest},
    }


def claim(path: Path, settings: dict[str, Any], size: int, remedy: str = ANOTHER_OUTPUT) -> set[int]:
    """Keep `settings` beside the responses; returns the positions that have theirs, `size` each. ValueError as for
    `check_claim`."""
    check_claim(path, settings, remedy)
    done = whole_groups(path, size, remedy) if path.exists() else set()
    write_settings(_beside(path), settings)
    return done


def check_claim(path: Path, settings: dict[str, Any], remedy: str = ANOTHER_OUTPUT) -> None:
    """ValueError, which ends in `remedy`, when there are responses and they were sampled with other settings. Changes
    nothing."""
    if path.exists():
        if not _beside(path).is_file():
            raise ValueError(
                f"{_beside(path)} is missing, so nobody knows what the responses in {path} were sampled with; {remedy}"
            )
        before = read_settings(_beside(path), ["rollout"], remedy)
        refuse_differences(f"{path} holds responses", before, settings, remedy)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")
