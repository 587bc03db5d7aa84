"""Runs `megatron-rl rollout`: samples and scores prompts, and writes down the responses."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from megatron_rl.config.agents import AGENT_KEYS
from megatron_rl.config.schema import RolloutPhase, SamplingConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.domains import check_reward_domains
from megatron_rl.data.judged import check_judged
from megatron_rl.data.mixture import PromptStream, load_prompts, load_stream
from megatron_rl.data.prompts import Prompt
from megatron_rl.endpoint import Endpoint
from megatron_rl.locks import sole_writer
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.append_log import has_responses, sample_into, told_of_resume, whole_groups, write_groups
from megatron_rl.rollout.provenance import (
    ANOTHER_OUTPUT,
    agent_digests,
    model_settings,
    read_settings,
    refuse_differences,
    reward_settings,
    write_settings,
)
from megatron_rl.rollout.rollout_file import group_rows
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.rollout.standalone import sampling
from megatron_rl.rollout.teacher import Teacher

log = logging.getLogger(__name__)


# Gives a sampler over servers of its own, of a configuration, a model, its tokenizer, the servers' name and a seed.
Sampling = Callable[[RolloutPhase, Path, Any, str, int], AbstractAsyncContextManager[Sampler]]


def run_rollout(
    config: SamplingConfig,
    model: Path | None,
    num_prompts: int,
    path: Path,
    resume: bool,
    sampling: Sampling = sampling,
) -> int:
    """Sample the first `num_prompts` prompts of the run's order, each rollout.samples_per_prompt times, by `model`, or
    by the configuration's teacher without one. Return the exit code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sole_writer(path, ANOTHER_OUTPUT):
        if has_responses(path) and not resume:
            raise ValueError(f"{path} exists; add --resume to go on with it, or name another with --output")
        with told_of_resume(path.parent, [path]):
            if model is None:
                asyncio.run(_ask_teacher(config, num_prompts, path))
            else:
                asyncio.run(_sample(config, model, num_prompts, path, sampling))
    return 0


async def _sample(config: SamplingConfig, model: Path, num_prompts: int, path: Path, sampling: Sampling) -> None:
    tokenizer = load_tokenizer(model)
    stream, input_ids = load_prompts(config, tokenizer)
    left = _left(config, stream, num_prompts, path, sampling_settings(config, model, stream.digest))
    questions = [Question(prompt_id=at, prompt=prompt, input_ids=input_ids[prompt.id]) for at, prompt in left]
    await sample_questions(config, model, tokenizer, questions, path, "rollout_server", sampling)
    log.info("%s: %d groups of %d responses", path, num_prompts, config.rollout.samples_per_prompt)


async def sample_questions(
    config: RolloutPhase,
    model: Path,
    tokenizer: Any,
    questions: Sequence[Question],
    path: Path,
    server: str,
    sampling: Sampling = sampling,
) -> None:
    """Append every question's scored group to `path`. server: what the logs of the servers are called after."""
    async with sampling(config, model, tokenizer, server, config.seed) as sampler:
        await sample_into(
            path,
            sampler,
            questions,
            lambda question, group: group_rows(
                group, question.prompt, config.reward.kind_of(question.prompt.domain), sampler.decode
            ),
            "prompts",
        )


def sampling_settings(config: RolloutPhase, model: Path, digest: str) -> dict[str, Any]:
    """Return what the responses of a model depend on. digest: of the prompts in their order."""
    of_agents = AGENT_KEYS if config.rollout.has_agent else ()
    settings = _settings(config, digest, ["engine", "max_prompt_tokens", *of_agents])
    if config.rollout.has_agent:
        settings["agent"] = agent_digests(config.rollout)
    return {"model": model_settings(model, config.serving.dtype), **settings}


async def _ask_teacher(config: SamplingConfig, num_prompts: int, path: Path) -> None:
    section = config.teacher
    assert section is not None
    endpoint = Endpoint(section, "teacher", section.tries)
    stream = load_stream(config.data, config.seed, needs_answer=config.reward.needs_answers)
    check_reward_domains(stream.rows, config.reward, "data.train")
    check_judged(stream.rows, config.reward)
    with Rewards(config.reward, config.run_dir) as rewards:
        asked = {"url", "model", "system", "top_p", "send_seed", "extra"}
        settings = {"teacher": section.model_dump(mode="json", include=asked), **_settings(config, stream.digest, [])}
        left = _left(config, stream, num_prompts, path, settings)
        teacher = Teacher(config, section, endpoint, rewards)
        await write_groups(path, teacher.as_completed(left, num_prompts - len(left)), len(left), "prompts")
    num_answered = num_prompts - teacher.num_failed
    log.info("%s: %d groups of %d responses", path, num_answered, config.rollout.samples_per_prompt)


def _left(
    config: SamplingConfig, stream: PromptStream, num_prompts: int, path: Path, settings: Mapping[str, Any]
) -> list[tuple[int, Prompt]]:
    """Claim `path` for these settings. Return (position, prompt) of those among the first `num_prompts` that have no
    responses there yet."""
    done = claim(path, settings, config.rollout.samples_per_prompt)
    taken, _ = stream.take(0, num_prompts)
    return [(position, prompt) for position, prompt in enumerate(taken) if position not in done]


def _settings(config: RolloutPhase, digest: str, of_rollout: Collection[str]) -> dict[str, Any]:
    """Return what the responses depend on beside the model. Not among them: how fast it goes, and how many prompts are
    taken, since more can follow. digest: of the prompts in their order. of_rollout: further keys of the section that
    count."""
    keys = {"samples_per_prompt", "temperature", "max_response_tokens", *of_rollout}
    return {
        "seed": config.seed,
        "rollout": config.rollout.model_dump(mode="json", include=keys),
        "reward": reward_settings(config.reward),
        "data": {"digest": digest},
    }


def claim(path: Path, settings: Mapping[str, Any], size: int, remedy: str = ANOTHER_OUTPUT) -> set[int]:
    """Keep `settings` beside the responses. Return the positions that have theirs, `size` each. Raise ValueError as
    `check_claim` does. Only for the one process that writes there (`sole_writer`)."""
    check_claim(path, settings, remedy)
    done = whole_groups(path, size, remedy)
    write_settings(_beside(path), settings)
    return done


def check_claim(path: Path, settings: Mapping[str, Any], remedy: str = ANOTHER_OUTPUT) -> None:
    """Raise ValueError, which ends in `remedy`, when there are responses and they were sampled with other settings.
    Change nothing."""
    if has_responses(path):
        if not _beside(path).is_file():
            raise ValueError(
                f"{_beside(path)} is missing, so nobody knows what the responses in {path} were sampled with; {remedy}"
            )
        before = read_settings(_beside(path), ["rollout"], remedy)
        refuse_differences(f"{path} holds responses", before, settings, remedy)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")
