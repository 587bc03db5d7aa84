"""`megatron-rl rollout`: sample and score prompts, and write down the responses."""

import asyncio
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import SamplingConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.mixture import PromptStream, load_stream
from megatron_rl.data.prompts import Prompt
from megatron_rl.endpoint import Endpoint
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.recorded import group_rows
from megatron_rl.rollout.resumable import sample_into, whole_groups, write_groups
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.settings import (
    model_settings,
    read_settings,
    refuse_differences,
    reward_settings,
    write_settings,
)
from megatron_rl.rollout.standalone import sampling
from megatron_rl.rollout.teacher import Teacher

log = logging.getLogger(__name__)


def run_rollout(config: SamplingConfig, model: Path | None, num_prompts: int, path: Path, resume: bool) -> int:
    """The first `num_prompts` prompts of the run's order, each sampled rollout.samples_per_prompt times by `model`, or
    by the configuration's teacher without one. Returns the exit code."""
    if path.exists() and not resume:
        raise ValueError(f"{path} exists; add --resume to go on with it, or name another with --output")
    if model is None:
        asyncio.run(_ask_teacher(config, num_prompts, path))
    else:
        asyncio.run(_sample(config, model, num_prompts, path))
    return 0


async def _sample(config: SamplingConfig, model: Path, num_prompts: int, path: Path) -> None:
    assert config.model is not None  # with a teacher there is no model
    tokenizer = load_tokenizer(model)
    stream = load_stream(config.data, config.seed)
    input_ids = rendered_prompts(stream.prompts, tokenizer, config.rollout.max_prompt_tokens, "data.train")
    settings = {
        "model": model_settings(model, config.model.dtype),
        **_settings(config, stream.digest, ["engine", "max_prompt_tokens"]),
    }
    left = _left(config, stream, num_prompts, path, settings)
    questions = [Question(prompt_id=at, prompt=prompt, input_ids=input_ids[prompt.id]) for at, prompt in left]
    async with sampling(config, model, tokenizer, "rollout_server", config.seed) as sampler:
        await sample_into(
            *(path, sampler, questions),
            lambda question, group: group_rows(group, question.prompt, tokenizer.decode),
            "prompts",
        )
    log.info("%s: %d groups of %d responses", path, num_prompts, config.rollout.samples_per_prompt)


async def _ask_teacher(config: SamplingConfig, num_prompts: int, path: Path) -> None:
    section = config.teacher
    assert section is not None
    endpoint = Endpoint(section, "teacher", section.tries)
    stream = load_stream(config.data, config.seed)
    with Rewards(config.reward) as rewards:
        asked = {"url", "model", "system", "top_p", "send_seed", "extra"}
        settings = {"teacher": section.model_dump(mode="json", include=asked), **_settings(config, stream.digest, [])}
        left = _left(config, stream, num_prompts, path, settings)
        teacher = Teacher(config, section, endpoint, rewards)
        await write_groups(path, teacher.as_completed(left), len(left), "prompts")
    num_answered = num_prompts - teacher.num_failed
    log.info("%s: %d groups of %d responses", path, num_answered, config.rollout.samples_per_prompt)


def _left(
    config: SamplingConfig, stream: PromptStream, num_prompts: int, path: Path, settings: Mapping[str, Any]
) -> list[tuple[int, Prompt]]:
    """(position, prompt) of those among the first `num_prompts` that have no responses in `path` yet, which is claimed
    for these settings."""
    done = _claim(path, settings, config.rollout.samples_per_prompt)
    taken, _ = stream.take(0, num_prompts)
    return [(position, prompt) for position, prompt in enumerate(taken) if position not in done]


def _settings(config: SamplingConfig, digest: str, of_rollout: Collection[str]) -> dict[str, Any]:
    """What the responses depend on beside the model. Not among them: how fast it goes, and how many prompts are taken,
    since more can follow. digest: of the prompts in their order. of_rollout: further keys of the section that count."""
    keys = {"samples_per_prompt", "temperature", "max_response_tokens", *of_rollout}
    return {
        "seed": config.seed,
        "rollout": config.rollout.model_dump(mode="json", include=keys),
        "reward": reward_settings(config.reward),
        "data": {"digest": digest},
    }


def _claim(path: Path, settings: Mapping[str, Any], size: int) -> set[int]:
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
