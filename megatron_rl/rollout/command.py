"""`megatron-rl rollout`: sample and score prompts, and write down the responses."""

import asyncio
import logging
from pathlib import Path

from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer, rendered_prompts
from megatron_rl.data.mixture import load_stream
from megatron_rl.rollout.recorded import group_rows
from megatron_rl.rollout.resumable import sample_into, whole_groups
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.standalone import sampling

log = logging.getLogger(__name__)


def run_rollout(config: RlConfig, model: Path, num_prompts: int, path: Path, resume: bool) -> int:
    """The first `num_prompts` prompts of the run's order, each sampled rollout.samples_per_prompt times by `model`.
    Returns the exit code."""
    if path.exists() and not resume:
        raise ValueError(f"{path} exists; add --resume to go on with it, or name another with --output")
    remedy = "set rollout.samples_per_prompt to what the file was written with, or name another --output"
    done = whole_groups(path, config.rollout.samples_per_prompt, remedy) if path.exists() else set()
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
    async with sampling(config, model, tokenizer, "rollout_server", config.seed) as sampler:
        await sample_into(
            *(path, sampler, questions),
            lambda question, group: group_rows(group, question.prompt, tokenizer.decode),
            "prompts",
        )
    num_groups = len(done) + len(questions)
    log.info("%s: %d groups of %d responses", path, num_groups, config.rollout.samples_per_prompt)
