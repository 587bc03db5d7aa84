"""`megatron-rl rollout`: sample and score prompts, and write down the responses."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import SamplingConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.mixture import load_stream
from megatron_rl.rollout.recorded import group_rows
from megatron_rl.rollout.resumable import sample_into, whole_groups
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.settings import (
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
    done = _claim(path, _settings(config, model, stream.digest), config.rollout.samples_per_prompt)
    taken, _ = stream.take(0, num_prompts)
    questions = [
        Question(prompt_id=position, prompt=prompt, input_ids=input_ids[prompt.id])
        for position, prompt in enumerate(taken)
        if position not in done
    ]
    async with sampling(config, model, tokenizer, "rollout_server", config.seed) as sampler:
        await sample_into(
            *(path, sampler, questions),
            lambda question, group: group_rows(group, question.prompt, tokenizer.decode),
            "prompts",
        )
    num_groups = len(done) + len(questions)
    log.info("%s: %d groups of %d responses", path, num_groups, config.rollout.samples_per_prompt)


def _settings(config: SamplingConfig, model: Path, digest: str) -> dict[str, Any]:
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


def _claim(path: Path, settings: dict[str, Any], size: int) -> set[int]:
    """Keep `settings` beside the responses; returns the positions that have theirs, `size` each. ValueError when those
    were sampled with other settings."""
    beside = path.with_name(f"{path.name}.settings.json")
    done: set[int] = set()
    if path.exists():
        if not beside.is_file():
            raise ValueError(
                f"{beside} is missing, so nobody knows what the responses in {path} were sampled with; name another "
                "--output"
            )
        refuse_differences(f"{path} holds responses", read_settings(beside, ["rollout"]), settings)
        done = whole_groups(path, size, "name another --output")
    write_settings(beside, settings)
    return done
