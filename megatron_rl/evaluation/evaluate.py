"""Runs `megatron-rl evaluate`: samples what is missing, then computes every number from the responses in the folder."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.config.benchmarks import BenchmarkSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.load import secret_variables
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.domains import check_reward_domains
from megatron_rl.errors import Fault
from megatron_rl.evaluation.benchmarks import (
    Benchmark,
    Sampled,
    benchmark_sampler,
    read_benchmark,
    result_of,
    sample_benchmark,
)
from megatron_rl.evaluation.report import average_of, markdown, show
from megatron_rl.evaluation.responses import Judged, as_line, judged_rows
from megatron_rl.evaluation.results import BenchmarkResult, finite
from megatron_rl.evaluation.settings import checked_settings, settings_of
from megatron_rl.evaluation.weights import served_model
from megatron_rl.files import whole_file, write_whole
from megatron_rl.locks import sole_writer
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.append_log import has_responses, told_of_resume
from megatron_rl.rollout.completion_order import in_order_of_completion
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.provenance import ANOTHER_OUTPUT, write_settings
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.standalone import serving

log = logging.getLogger(__name__)

_JUDGED_AT_ONCE = 256  # responses whose text is in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Left:
    """Holds a benchmark and what is to be done for it. questions: without a response yet. num_given_up: responses
    without a verdict. path: of the responses."""

    benchmark: Benchmark
    questions: tuple[Question, ...]
    num_given_up: int
    path: Path

    @property
    def name(self) -> str:
        return self.benchmark.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Says how fast this call sampled; the responses of earlier calls are not counted."""

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
    results = {name: result_of(_path(folder, name), section) for name, section in sections.items()}
    _write(folder, settings, results, speeds)
    _check_rewards(config, results, folder)
    return 0


async def _sample(
    config: EvaluateConfig, sections: Mapping[str, BenchmarkSection], folder: Path, claimed: Mapping[str, Any]
) -> dict[str, Speed | None]:
    """Sample and judge what is missing, and return the speeds. What is wrong with data, rewards or sandbox is found
    before a server starts, and before `folder` is claimed by writing the settings `claimed`."""
    tokenizer = load_tokenizer(config.model.path)
    found = [_left(config, name, section, tokenizer, folder) for name, section in sections.items()]
    if len(sections) == len(config.benchmarks):  # else a domain may be that of a benchmark that is left out
        check_reward_domains((p for one in found for p in one.benchmark.one_of_each), config.reward, "the benchmarks")
    if config.rollout.temperature == 0 and any(section.samples > 1 for section in sections.values()):
        log.warning("rollout.temperature 0 is greedy, so all samples of a prompt are alike; samples = 1 is enough")
    speeds: dict[str, Speed | None] = dict.fromkeys(sections)
    left = [one for one in found if one.questions or one.num_given_up]
    model, rollout = config.model, config.rollout.as_rollout()
    with ExitStack() as closing:
        rewards = [closing.enter_context(Rewards(one.benchmark.reward, folder)) for one in left]
        write_settings(folder / "settings.json", claimed)
        judges = list(zip(left, rewards, strict=True))
        for one, judge in judges:
            if one.num_given_up:
                await _judge_again(one, judge)
        if any(one.questions for one in left):
            variables = secret_variables(config)
            weights = closing.enter_context(served_model(model.path, folder))
            async with serving(weights, model.dtype, rollout, folder, "evaluate_server", variables) as servers:
                for one, judge in judges:
                    if one.questions:
                        speeds[one.name] = await _run(config, one, servers, judge, tokenizer)
    return speeds


async def _judge_again(left: _Left, rewards: Rewards) -> None:
    """Judge again the responses whose judge gave up, from their text; the file is replaced as a whole."""
    log.info("%s: judging %d responses again whose judge gave up", left.name, left.num_given_up)
    prompts = left.benchmark.prompts

    async def again(row: Judged) -> Judged:
        if row.reason not in GAVE_UP:
            return row
        attempt = Attempt(text=row.response, finish_reason=row.finish_reason, num_tokens=row.num_tokens)
        (verdict,) = await rewards.verdicts(prompts[row.position % len(prompts)], [attempt])
        return replace(
            row, score=verdict.score, reason=verdict.reason, details=verdict.details, parts=dict(verdict.parts)
        )

    with whole_file(left.path, is_durable=True) as file:
        async for row in in_order_of_completion(map(again, judged_rows(left.path)), _JUDGED_AT_ONCE):
            file.write(as_line(row))


async def _run(config: EvaluateConfig, left: _Left, servers: ServerPool, rewards: Rewards, tokenizer: Any) -> Speed:
    log.info("%s: %d responses to %d prompts", left.name, len(left.questions), len(left.benchmark.prompts))
    sampled = Sampled(
        model=config.model.path,
        rollout=config.rollout.as_rollout(),
        seed=config.seed,
        top_p=config.rollout.top_p,
        folder=left.path.parent,
    )
    async with benchmark_sampler(left.benchmark, servers, rewards, tokenizer, sampled) as sampler:
        started = time.perf_counter()
        num_tokens = await sample_benchmark(left.benchmark, left.questions, left.path, sampler)
    seconds = time.perf_counter() - started
    return Speed(num_responses=len(left.questions), seconds=seconds, tokens_per_second=num_tokens / seconds)


def _chosen(config: EvaluateConfig, names: Sequence[str]) -> dict[str, BenchmarkSection]:
    for name in names:
        if name not in config.benchmarks:
            raise ValueError(f"--benchmark {name} is not one of the configuration's: {', '.join(config.benchmarks)}")
    return {name: section for name, section in config.benchmarks.items() if not names or name in names}


def _left(config: EvaluateConfig, name: str, section: BenchmarkSection, tokenizer: Any, folder: Path) -> _Left:
    benchmark = read_benchmark(name, section, config.reward, tokenizer, config.rollout.max_prompt_tokens)
    path = _path(folder, name)
    questions = benchmark.left(path)
    # An agent's score cannot be judged again, so nothing of it counts as given up.
    is_begun = len(questions) < len(benchmark.questions) and not config.rollout.has_agent
    num_given_up = sum(row.reason in GAVE_UP for row in judged_rows(path)) if is_begun else 0
    return _Left(benchmark=benchmark, questions=questions, num_given_up=num_given_up, path=path)


def _write(
    folder: Path,
    settings: dict[str, Any],
    results: Mapping[str, BenchmarkResult],
    speeds: Mapping[str, Speed | None],
) -> None:
    """Write results.json and results.md, and show the table on the terminal."""
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
    write_whole(folder / "results.json", json.dumps(finite(record), indent=1))
    write_whole(folder / "results.md", markdown(results, model))
    show(results, model)


def _check_rewards(config: EvaluateConfig, results: Mapping[str, BenchmarkResult], folder: Path) -> None:
    max_error_share = config.reward.max_error_share
    remedy = "remove the file to run the agents again" if config.rollout.has_agent else "--resume judges them again"
    for name, result in results.items():
        if result.error_share > max_error_share:
            counts = ", ".join(f"{reason} {count}" for reason, count in result.reasons.items())
            raise Fault(
                f"{name}: a share of {result.error_share:.2f} of the responses could not be judged ({counts}), more "
                f"than reward.max_error_share = {max_error_share:g}; they count as wrong, so do not trust the results. "
                f'"details" in {_path(folder, name)} says why; {remedy}'
            )


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"
