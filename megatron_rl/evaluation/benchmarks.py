"""Samples a benchmark: its prompts become questions, and its responses go into a file that grows while they come."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config.benchmarks import BenchmarkSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.chat import response_decoder
from megatron_rl.data.fitting import Limit, rendered_prompts
from megatron_rl.data.judged import check_judged
from megatron_rl.data.prompts import Prompt, read_prompts
from megatron_rl.evaluation.responses import as_line, judged, read_verdicts
from megatron_rl.evaluation.results import BenchmarkResult, summarise
from megatron_rl.families import load_architecture
from megatron_rl.gateway.sampler import AgentSampler, agent_settings, started
from megatron_rl.records import Group
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.append_log import sample_into, whole_groups
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.rollout_file import text_of
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.rollout.standalone import no_advantages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Evaluation must not repeat the random numbers of training.
_SEED_OFFSET = 1_000_000_007


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Holds a benchmark. questions: every prompt, `section.samples` times over. one_of_each: the first prompt of each
    domain in its file.

    Each response is a group of its own, so that every one is saved by itself and more samples can follow later.
    """

    name: str
    section: BenchmarkSection
    reward: RewardSection
    prompts: tuple[Prompt, ...]
    questions: tuple[Question, ...]
    one_of_each: tuple[Prompt, ...]

    def left(self, path: Path) -> tuple[Question, ...]:
        """Return the questions without a response in the file. A last response that a kill cut short is removed from
        it."""
        done = whole_groups(path, 1, "remove the file")
        return tuple(question for question in self.questions if question.prompt_id not in done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Says how benchmarks are sampled. model: the directory with the shape and the tokenizer. rollout: with groups of
    one response. seed: of the configuration. folder: takes what agents print."""

    model: Path
    rollout: RolloutSection
    seed: int
    top_p: float
    folder: Path


def result_of(path: Path, section: BenchmarkSection) -> BenchmarkResult:
    """Compute the numbers of a benchmark from its file, which has all responses and may have more."""
    return summarise([row for row in read_verdicts(path) if row.sample_index < section.samples], section.at)


def read_benchmark(
    name: str,
    section: BenchmarkSection,
    reward: RewardSection,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    table: str = "benchmarks",
) -> Benchmark:
    """Read a benchmark. Raise ValueError for prompts that cannot be used. reward: of all benchmarks. table: of the
    configuration, where this one is."""
    reward = section.reward_of(reward)
    everything = read_prompts(
        section.path, section.domain, section.suffix, system=section.system, needs_answer=reward.needs_answers
    )
    prompts = everything[: section.prompts]
    if section.prompts is not None and len(prompts) < section.prompts:
        raise ValueError(
            f"{section.path} holds {len(prompts)} prompts, {table}.{name}.prompts is {section.prompts}; lower it"
        )
    check_judged(prompts, reward, f"{table}.{name}.suffix")
    limit = Limit(tokens=max_prompt_tokens, key="rollout.max_prompt_tokens")
    input_ids = rendered_prompts(
        prompts, tokenizer, limit, section.special_tokens, arguments=section.template_arguments
    )
    return Benchmark(
        name=name,
        section=section,
        reward=reward,
        prompts=tuple(prompts),
        questions=tuple(_questions(prompts, input_ids, section.samples)),
        one_of_each=tuple({prompt.domain: prompt for prompt in reversed(everything)}.values()),
    )


@asynccontextmanager
async def benchmark_sampler(
    benchmark: Benchmark,
    servers: ServerPool,
    rewards: Rewards,
    tokenizer: "PreTrainedTokenizerBase",
    sampled: Sampled,
) -> AsyncIterator[Sampler]:
    """Give a sampler of single responses, or of single runs of an agent where the section rollout names one."""
    architecture, rollout = load_architecture(sampled.model), sampled.rollout
    end_ids, top_p = architecture.eos_token_ids, sampled.top_p
    decode = response_decoder(tokenizer, end_ids)
    how = (servers, rewards, decode, no_advantages, rollout, sampled.seed + _SEED_OFFSET)
    if not rollout.has_agent:
        yield Sampler(*how, end_ids, top_p=top_p)
        return
    settings = agent_settings(
        sampled.model, architecture, sampled.folder, benchmark.reward.passing_score, benchmark.section
    )
    async with started(AgentSampler(*how, tokenizer, settings, top_p=top_p)) as sampler:
        yield sampler


async def sample_benchmark(benchmark: Benchmark, questions: Sequence[Question], path: Path, sampler: Sampler) -> int:
    """Append the judged response of every question to the file. Returns the number of tokens that were sampled."""

    def lines(question: Question, group: Group) -> str:
        (sample,) = group.samples
        kind, text = benchmark.reward.kind_of(question.prompt.domain), text_of(sample.response, sampler.decode)
        return as_line(judged(sample, question.prompt, len(benchmark.prompts), kind, text))

    return await sample_into(path, sampler, questions, lines, "responses")


def _questions(prompts: Sequence[Prompt], input_ids: Mapping[str, tuple[int, ...]], num_samples: int) -> list[Question]:
    tokens = [input_ids[prompt.id] for prompt in prompts]
    return [
        Question(prompt_id=i * len(prompts) + place, prompt=prompt, input_ids=ids)
        for i in range(num_samples)
        for place, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True))
    ]
