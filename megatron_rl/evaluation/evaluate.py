"""`megatron-rl evaluate`: sample what is missing, then compute every number from the responses in the folder."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.config.evaluation import BenchmarkSection, EvaluateConfig
from megatron_rl.config.load import secret_variables
from megatron_rl.config.reward import RewardSection
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
from megatron_rl.evaluation.weights import served_model
from megatron_rl.families import load_architecture
from megatron_rl.files import whole_file
from megatron_rl.locks import sole_writer
from megatron_rl.records import Group
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.append_log import has_responses, sample_into, told_of_resume, whole_groups
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
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, ANOTHER_OUTPUT), _nothing_left(folder, [_path(folder, name) for name in sections], is_new):
        return _evaluate(config, folder, sections, settings, resume)


@contextmanager
def _nothing_left(folder: Path, responses: Sequence[Path], is_new: bool) -> Iterator[None]:
    """Undo what a try that fails before its first response has made, so that the corrected command needs no --resume.
    Logs of servers stay: they say why. is_new: the folder was made for it."""
    settings = folder / "settings.json"
    was_there = settings.exists()
    try:
        yield
    except BaseException:
        if not was_there and not any(map(has_responses, responses)):
            for path in (settings, *responses):
                path.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        raise


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
        rewards = [closing.enter_context(Rewards(benchmark.reward, folder)) for benchmark in left]
        write_settings(folder / "settings.json", claimed)
        judges = list(zip(left, rewards, strict=True))
        for benchmark, judge in judges:
            if benchmark.num_given_up:
                await _judge_again(benchmark, judge)
        if any(benchmark.questions for benchmark in left):
            variables = secret_variables(config)
            weights = closing.enter_context(served_model(model.path, folder))
            async with serving(weights, model.dtype, rollout, folder, "evaluate_server", variables) as servers:
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
        attempt = Attempt(text=row.response, finish_reason=row.finish_reason, num_tokens=row.num_tokens)
        (verdict,) = await rewards.verdicts(prompt, [attempt])
        return replace(
            row, score=verdict.score, reason=verdict.reason, details=verdict.details, parts=dict(verdict.parts)
        )

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
    reward = section.reward_of(config.reward)
    everything = read_prompts(
        section.path, section.domain, section.suffix, system=section.system, needs_answer=reward.needs_answers
    )
    prompts = everything[: section.prompts]
    if section.prompts is not None and len(prompts) < section.prompts:
        raise ValueError(
            f"{section.path} holds {len(prompts)} prompts, benchmarks.{name}.prompts is {section.prompts}; lower it"
        )
    check_judged(prompts, reward, f"benchmarks.{name}.suffix")
    limit = Limit(tokens=config.rollout.max_prompt_tokens, key="rollout.max_prompt_tokens")
    input_ids = rendered_prompts(
        prompts, tokenizer, limit, section.special_tokens, arguments=section.template_arguments
    )
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
    (folder / "results.json").write_text(json.dumps(_finite(record), indent=1), encoding="utf-8")
    (folder / "results.md").write_text(markdown(results, model), encoding="utf-8")
    show(results, model)


def _finite(value: Any) -> Any:
    """The ends of the interval of a single prompt's scores are nowhere, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
