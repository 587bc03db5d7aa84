"""`megatron-rl evaluate`: sample what is missing, then compute every number from the responses in the folder."""

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.config.evaluation import BenchmarkSection, EvaluateConfig
from megatron_rl.config.load import secret_variables
from megatron_rl.config.reward import JudgeSection, RewardSection
from megatron_rl.data.chat import load_tokenizer, response_decoder
from megatron_rl.data.domains import check_reward_domains
from megatron_rl.data.fitting import Limit, rendered_prompts
from megatron_rl.data.judged import check_judged
from megatron_rl.data.prompts import Prompt, read_prompts
from megatron_rl.errors import Fault
from megatron_rl.evaluation.report import average_of, markdown, show
from megatron_rl.evaluation.responses import Judged, as_line, judged, judged_rows, read_verdicts
from megatron_rl.evaluation.results import BenchmarkResult, summarise
from megatron_rl.evaluation.settings import checked_settings, settings_of
from megatron_rl.families import load_architecture
from megatron_rl.files import whole_file
from megatron_rl.locks import sole_writer
from megatron_rl.records import Group
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.append_log import sample_into, told_of_resume, whole_groups
from megatron_rl.rollout.completion_order import in_order_of_completion
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.provenance import ANOTHER_OUTPUT, write_settings
from megatron_rl.rollout.rollout_file import text_of
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.rollout.standalone import no_advantages, serving

log = logging.getLogger(__name__)

# Evaluation must not repeat the random numbers of training.
_SEED_OFFSET = 1_000_000_007
_JUDGED_AT_ONCE = 256  # responses whose text is in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One that is to be run. questions: those without a response yet. num_given_up: responses without a verdict.
    path: of the responses. one_of_each: the first prompt of each domain in its file."""

    name: str
    section: BenchmarkSection
    reward: RewardSection
    prompts: tuple[Prompt, ...]
    questions: tuple[Question, ...]
    num_given_up: int
    path: Path
    one_of_each: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of what this call sampled; the responses of earlier ones are not counted."""

    num_responses: int
    seconds: float
    tokens_per_second: float


def run_evaluation(config: EvaluateConfig, folder: Path, names: Sequence[str], resume: bool) -> int:
    """Evaluate `config.model.path` on the benchmarks called `names`, on all without any, and leave everything in
    `folder`. Returns the exit code; Fault when too many responses of a benchmark could not be judged."""
    sections = _chosen(config, names)
    settings = settings_of(config, sections)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, ANOTHER_OUTPUT):
        return _evaluate(config, folder, sections, settings, resume)


def _evaluate(
    config: EvaluateConfig,
    folder: Path,
    sections: Mapping[str, BenchmarkSection],
    settings: dict[str, Any],
    resume: bool,
) -> int:
    claimed = checked_settings(folder, settings, resume)
    with told_of_resume(folder, [_path(folder, name) for name in sections]):
        speeds = asyncio.run(_sample(config, sections, folder, claimed))
    results = {
        name: summarise([r for r in read_verdicts(_path(folder, name)) if r.sample_index < section.samples], section.at)
        for name, section in sections.items()
    }
    _write(folder, settings, results, speeds)
    _check_rewards(config.reward.max_error_share, results, folder)
    return 0


async def _sample(
    config: EvaluateConfig, sections: Mapping[str, BenchmarkSection], folder: Path, claimed: Mapping[str, Any]
) -> dict[str, Speed | None]:
    """What is wrong with data, rewards or sandbox is found before a server starts, and before `folder` is claimed by
    writing the settings `claimed`."""
    tokenizer = load_tokenizer(config.model.path)
    benchmarks = [_benchmark(config, name, section, tokenizer, folder) for name, section in sections.items()]
    if len(sections) == len(config.benchmarks):  # else it may be of one that is left out
        check_reward_domains((p for b in benchmarks for p in b.one_of_each), config.reward, "the benchmarks")
    if config.rollout.temperature == 0 and any(section.samples > 1 for section in sections.values()):
        log.warning("rollout.temperature 0 is greedy, so all samples of a prompt are alike; samples = 1 is enough")
    speeds: dict[str, Speed | None] = dict.fromkeys(sections)
    left = [benchmark for benchmark in benchmarks if benchmark.questions or benchmark.num_given_up]
    model, rollout = config.model, config.rollout.as_rollout()
    with ExitStack() as closing:
        rewards = [closing.enter_context(Rewards(benchmark.reward)) for benchmark in left]
        write_settings(folder / "settings.json", claimed)
        judges = list(zip(left, rewards, strict=True))
        for benchmark, judge in judges:
            if benchmark.num_given_up:
                await _judge_again(benchmark, judge)
        if any(benchmark.questions for benchmark in left):
            variables = secret_variables(config)
            async with serving(model.path, model.dtype, rollout, folder, "evaluate_server", variables) as servers:
                for benchmark, judge in judges:
                    if benchmark.questions:
                        speeds[benchmark.name] = await _run(config, benchmark, servers, judge, tokenizer)
    return speeds


async def _judge_again(benchmark: Benchmark, rewards: Rewards) -> None:
    """The responses whose judge gave up, from their text; the file is replaced as a whole."""
    log.info("%s: judging %d responses again whose judge gave up", benchmark.name, benchmark.num_given_up)

    async def again(row: Judged) -> Judged:
        if row.reason not in GAVE_UP:
            return row
        prompt = benchmark.prompts[row.position % len(benchmark.prompts)]
        verdict = await rewards.verdict(prompt.domain, prompt.prompt, prompt.answer, row.response)
        return replace(row, score=verdict.score, reason=verdict.reason, details=verdict.details)

    with whole_file(benchmark.path, is_durable=True) as file:
        async for row in in_order_of_completion(map(again, judged_rows(benchmark.path)), _JUDGED_AT_ONCE):
            file.write(as_line(row))


async def _run(
    config: EvaluateConfig, benchmark: Benchmark, servers: ServerPool, rewards: Rewards, tokenizer: Any
) -> Speed:
    log.info("%s: %d responses to %d prompts", benchmark.name, len(benchmark.questions), len(benchmark.prompts))

    end_ids = load_architecture(config.model.path).eos_token_ids
    decode = response_decoder(tokenizer, end_ids)

    def lines(question: Question, group: Group) -> str:
        (sample,) = group.samples
        kind, text = benchmark.reward.kind_of(question.prompt.domain), text_of(sample.response, decode)
        return as_line(judged(sample, question.prompt, len(benchmark.prompts), kind, text))

    sampler = Sampler(
        servers,
        rewards,
        decode,
        no_advantages,
        config.rollout.as_rollout(),
        config.seed + _SEED_OFFSET,
        end_ids,
        top_p=config.rollout.top_p,
    )
    started = time.perf_counter()
    num_tokens = await sample_into(benchmark.path, sampler, benchmark.questions, lines, "responses")
    seconds = time.perf_counter() - started
    return Speed(num_responses=len(benchmark.questions), seconds=seconds, tokens_per_second=num_tokens / seconds)


def _chosen(config: EvaluateConfig, names: Sequence[str]) -> dict[str, BenchmarkSection]:
    for name in names:
        if name not in config.benchmarks:
            raise ValueError(f"--benchmark {name} is not one of the configuration's: {', '.join(config.benchmarks)}")
    return {name: section for name, section in config.benchmarks.items() if not names or name in names}


def _benchmark(config: EvaluateConfig, name: str, section: BenchmarkSection, tokenizer: Any, folder: Path) -> Benchmark:
    everything = read_prompts(section.path, section.domain, section.suffix)
    prompts = everything[: section.prompts]
    if section.prompts is not None and len(prompts) < section.prompts:
        raise ValueError(
            f"{section.path} holds {len(prompts)} prompts, benchmarks.{name}.prompts is {section.prompts}; lower it"
        )
    reward = _reward(config.reward, section)
    check_judged(prompts, reward, f"benchmarks.{name}.suffix")
    limit = Limit(tokens=config.rollout.max_prompt_tokens, key="rollout.max_prompt_tokens")
    if section.template_arguments:
        tokenizer = load_tokenizer(config.model.path, section.template_arguments)
    input_ids = rendered_prompts(prompts, tokenizer, limit, section.special_tokens)
    path = _path(folder, name)
    done = whole_groups(path, 1, "remove the file")
    return Benchmark(
        name=name,
        section=section,
        reward=reward,
        prompts=tuple(prompts),
        questions=tuple(q for q in _questions(prompts, input_ids, section.samples) if q.prompt_id not in done),
        num_given_up=sum(row.reason in GAVE_UP for row in judged_rows(path)) if done else 0,
        path=path,
        one_of_each=tuple({prompt.domain: prompt for prompt in reversed(everything)}.values()),
    )


def _questions(prompts: Sequence[Prompt], input_ids: Mapping[str, tuple[int, ...]], num_samples: int) -> list[Question]:
    """All prompts, so many times over. So every response is saved by itself, and more samples can follow later."""
    tokens = [input_ids[prompt.id] for prompt in prompts]
    return [
        Question(prompt_id=i * len(prompts) + place, prompt=prompt, input_ids=ids)
        for i in range(num_samples)
        for place, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True))
    ]


def _reward(reward: RewardSection, section: BenchmarkSection) -> RewardSection:
    """How this benchmark is judged. Not validated again: "choice" is for evaluation only."""
    if section.reward is None:
        return reward
    return reward.model_copy(update={"kind": section.reward, "domains": {}, "judge": JudgeSection()})


def _write(
    folder: Path,
    settings: dict[str, Any],
    results: Mapping[str, BenchmarkResult],
    speeds: Mapping[str, Speed | None],
) -> None:
    """results.json, results.md, and the table on the terminal."""
    model = settings["model"]["path"]
    record = {
        "model": model,
        "average": asdict(average_of(results)),
        "benchmarks": {
            name: asdict(result) | {"speed": asdict(speed) if (speed := speeds[name]) else None}
            for name, result in results.items()
        },
        "settings": settings,
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "results.md").write_text(markdown(results, model), encoding="utf-8")
    show(results, model)


def _check_rewards(max_error_share: float, results: Mapping[str, BenchmarkResult], folder: Path) -> None:
    for name, result in results.items():
        if result.error_share > max_error_share:
            counts = ", ".join(f"{reason} {count}" for reason, count in result.reasons.items())
            raise Fault(
                f"{name}: a share of {result.error_share:.2f} of the responses could not be judged ({counts}), more "
                f"than reward.max_error_share = {max_error_share:g}; they count as wrong, so do not trust the results. "
                f'"details" in {_path(folder, name)} says why; --resume judges them again'
            )


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"
