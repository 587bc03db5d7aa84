"""`megatron-rl rollout`: sample and score prompts, and write down the responses."""

import asyncio
import json
import logging
import os
import time
from pathlib import Path

from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.mixture import load_stream
from megatron_rl.rollout.recorded import group_rows
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.standalone import sampling

log = logging.getLogger(__name__)

_PROGRESS_EVERY_SECONDS = 10.0


def run_rollout(config: RlConfig, model: Path, num_prompts: int, path: Path, resume: bool) -> int:
    """The first `num_prompts` prompts of the run's order, each sampled rollout.samples_per_prompt times by `model`.
    Returns the exit code."""
    if path.exists() and not resume:
        raise ValueError(f"{path} exists; add --resume to go on with it, or name another with --output")
    done = _whole_groups(path, config.rollout.samples_per_prompt) if path.exists() else set()
    asyncio.run(_rollout(config, model, num_prompts, path, done))
    return 0


async def _rollout(config: RlConfig, model: Path, num_prompts: int, path: Path, done: set[int]) -> None:
    tokenizer = load_tokenizer(model)
    stream = load_stream(config.data, config.seed)
    input_ids = rendered_prompts(stream.prompts, tokenizer, config.rollout.max_prompt_tokens, "data.train")
    taken, _ = stream.take(0, num_prompts)
    questions = [
        Question(prompt_id=position, prompt=prompt, input_ids=input_ids[prompt.id])
        for position, prompt in enumerate(taken)
        if position not in done
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    started = told = time.perf_counter()
    num_groups = num_tokens = 0
    reward = 0.0
    async with sampling(config, model, tokenizer, "rollout_server", config.seed) as sampler:
        with path.open("a") as file:
            async for question, group in sampler.as_completed(questions, 0):
                file.write(group_rows(group, question.prompt, tokenizer.decode))
                file.flush()
                os.fsync(file.fileno())
                num_groups += 1
                num_tokens += sum(sample.response.num_output_tokens for sample in group.samples)
                reward += sum(sample.reward for sample in group.samples) / len(group.samples)
                if time.perf_counter() - told > _PROGRESS_EVERY_SECONDS or num_groups == len(questions):
                    told = time.perf_counter()
                    log.info(
                        "%d of %d prompts, mean reward %.3f, %.0f tokens/s",
                        *(num_groups, len(questions), reward / num_groups, num_tokens / (told - started)),
                    )
    log.info("%s: %d groups of %d responses", path, num_groups + len(done), config.rollout.samples_per_prompt)


def _whole_groups(path: Path, size: int) -> set[int]:
    """Positions of the groups of `size` responses in the file. A last group that a kill cut short is cut off;
    ValueError for any other that is not whole, and nothing is changed."""
    sizes: dict[int, int] = {}
    end_of_whole = end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                position = int(json.loads(line)["position"])
            except (ValueError, KeyError, TypeError):
                if file.read(1):
                    raise ValueError(f"{path}: a line after byte {end} is no response; name another --output") from None
                break  # the last one, cut short
            end += len(line)
            sizes[position] = sizes.get(position, 0) + 1
            if sizes[position] == size:
                end_of_whole = end
    last = next(reversed(sizes), None)
    for position, count in sizes.items():
        if count > size or (count < size and position != last):
            raise ValueError(
                f"{path}: the group at position {position} has {count} responses, rollout.samples_per_prompt is "
                f"{size}; set it to what the file was written with, or name another --output"
            )
    with path.open("r+b") as file:
        file.truncate(end_of_whole)
    return {position for position, count in sizes.items() if count == size}
