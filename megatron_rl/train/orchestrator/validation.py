"""Does rank 0's part of a validation: the run's own servers answer benchmarks with the weights that they have just
got."""

import logging
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from megatron_rl.config.benchmarks import ValidationSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.evaluation.benchmarks import (
    Benchmark,
    Sampled,
    benchmark_sampler,
    read_benchmark,
    result_of,
    sample_benchmark,
)
from megatron_rl.evaluation.results import BenchmarkResult
from megatron_rl.evaluation.settings import benchmark_settings
from megatron_rl.evaluation.validations import Row, Validations, best_row, told_score
from megatron_rl.parsing import read_json
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.provenance import (
    model_settings,
    read_settings,
    reward_settings,
    settings_of_agents,
    told_differences,
    write_settings,
)
from megatron_rl.rollout.sampler import Question
from megatron_rl.train.orchestrator.group_source import ServerGroups

log = logging.getLogger(__name__)


class Validation:
    """Samples and judges the benchmarks of a run. Owns the judges that training has not. `close()` ends them.

    Nothing of it reaches training: prompts, random numbers and files are its own, and servers answer by seeds.
    """

    def __init__(
        self, config: RlConfig, section: ValidationSection, servers: ServerGroups, validations: Validations
    ) -> None:
        """Read the benchmarks and open their judges. Raise ValueError for benchmarks that cannot be used, or are not
        those of the run's earlier scores, and Fault when their answers cannot be judged here."""
        self._config, self._section, self._servers, self._validations = config, section, servers, validations
        self._tokenizer, most = load_tokenizer(config.model.path), config.rollout.max_prompt_tokens
        self._benchmarks = [
            read_benchmark(name, benchmark, config.reward, self._tokenizer, most, "validation.benchmarks")
            for name, benchmark in section.benchmarks.items()
        ]
        trained = servers.trained_prompts()
        for benchmark in self._benchmarks:
            _warn(benchmark, section.temperature, trained)
        self._settings = {
            "model": model_settings(config.model.path, config.model.dtype),
            "sampling": {
                "temperature": section.temperature,
                "top_p": section.top_p,
                "seed": config.seed,
                **config.rollout.model_dump(include={"engine", "max_prompt_tokens", "max_response_tokens"}),
                **settings_of_agents(config.rollout),
            },
            "reward": reward_settings(config.reward),
        }
        for benchmark in self._benchmarks:
            _check_unchanged(validations, benchmark.name, self._settings_of(benchmark))
        self._own: list[Rewards] = []
        try:
            self._judges = self._open_judges()
        except BaseException:
            self.close()
            raise

    @property
    def best_step(self) -> int | None:
        """The number of completed steps of the weights with the best score of train.keep_best so far."""
        best = self._best()
        return None if best is None else int(best["step"])

    def has(self, step: int) -> bool:
        """Tell whether the weights of so many completed steps have been validated."""
        return any(row["step"] == step for row in self._validations.rows)

    def run(self, step: int) -> Row:
        """Validate the weights that the servers have, those of `step` completed steps. What an interrupted validation
        of the same weights has sampled is kept.

        Raises StopRequested and WeightsNeeded as `ServerGroups.groups` does, and OSError when the disk takes no more.
        """
        started = time.perf_counter()
        folder = self._validations.folder(step)
        results = {
            benchmark.name: self._result(benchmark, rewards, folder)
            for benchmark, rewards in zip(self._benchmarks, self._judges, strict=True)
        }
        row = self._validations.add(step, time.perf_counter() - started, results)
        self._tell(row, results)
        return row

    def told_best(self) -> str:
        """Say which step was the best by train.keep_best, and where its checkpoint is."""
        best, config = self._best(), self._config
        if best is None:
            return ""
        score = f"{config.train.keep_best} {told_score(best, config.train.keep_best)}"
        path = config.run_dir / "checkpoints" / f"step_{best['step']}"
        if best["step"] == 0:
            return f"best of validation: {score}, of the weights that the run began with, {config.model.path}"
        if best["step"] == config.train.steps:
            return f"best of validation: {score}, of the last weights, {config.run_dir / 'hf'}"
        where = (
            f"megatron-rl convert {path} DIRECTORY --to hf makes a model directory of it"
            if path.exists()
            else "which is not there: it was not saved, or train.keep_best was not set then"
        )
        return f"best of validation: {score}, of step {best['step']}, {path}; {where}"

    def close(self) -> None:
        for rewards in self._own:
            rewards.close()

    def _best(self) -> Row | None:
        name = self._config.train.keep_best
        return best_row(self._validations.rows, name) if name else None

    def _open_judges(self) -> list[Rewards]:
        """Open a judge for each benchmark, or take the run's own where it judges alike."""
        known: list[tuple[RewardSection, Rewards]] = [(self._config.reward, self._servers.rewards)]
        found = []
        for benchmark in self._benchmarks:
            rewards = next((rewards for section, rewards in known if section == benchmark.reward), None)
            if rewards is None:
                rewards = Rewards(benchmark.reward, self._config.run_dir)
                self._own.append(rewards)
                known.append((benchmark.reward, rewards))
            found.append(rewards)
        return found

    def _settings_of(self, benchmark: Benchmark) -> dict[str, Any]:
        return self._settings | {"benchmark": benchmark_settings(benchmark.section)}

    def _result(self, benchmark: Benchmark, rewards: Rewards, folder: Path) -> BenchmarkResult:
        path = folder / f"{benchmark.name}.jsonl"
        _claim(path, self._settings_of(benchmark))
        if questions := benchmark.left(path):
            self._servers.run_generating(self._sample(benchmark, rewards, questions, path))
        return result_of(path, benchmark.section)

    async def _sample(self, benchmark: Benchmark, rewards: Rewards, questions: Sequence[Question], path: Path) -> None:
        config, section = self._config, self._section
        alone = {"prompts_per_step": 1, "samples_per_prompt": 1, "temperature": section.temperature}
        sampled = Sampled(
            model=config.model.path,
            rollout=config.rollout.model_copy(update=alone),
            seed=config.seed,
            top_p=section.top_p,
            folder=path.parent,
        )
        async with benchmark_sampler(benchmark, self._servers.pool, rewards, self._tokenizer, sampled) as sampler:
            await sample_benchmark(benchmark, questions, path, sampler)

    def _tell(self, row: Row, results: Mapping[str, BenchmarkResult]) -> None:
        scores = ", ".join(f"{name} {told_score(row, name)}" for name in results)
        log.info("validation after %d steps: %s", row["step"], scores)
        for name, result in results.items():
            if result.error_share > self._config.reward.max_error_share:
                log.warning(
                    "validation after %d steps: a share of %.2f of the responses to %s could not be judged, more than "
                    'reward.max_error_share, and counts as wrong; "details" in %s says why',
                    *(row["step"], result.error_share, name, self._validations.folder(row["step"]) / f"{name}.jsonl"),
                )


def _check_unchanged(validations: Validations, name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a resumed run would go on with a benchmark's curve on other questions or by another judge.
    Warn where it samples or judges otherwise for another reason: a later stage may have longer responses."""
    steps = [row["step"] for row in validations.rows if name in row["benchmarks"]]
    if not steps:
        return
    try:
        path = _beside(validations.folder(steps[-1]) / f"{name}.jsonl")
        before = read_settings(path, ["sampling", "reward", "benchmark"])
    except (OSError, ValueError):  # somebody has tidied up
        return
    then, now = before["benchmark"], settings["benchmark"]
    if changed := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
        what = " and ".join("the text of its file" if key == "sha256" else f"its key {key}" for key in changed)
        raise ValueError(
            f"validation.benchmarks.{name} is not what the scores of this run up to step {steps[-1]} are of: {what} "
            f"changed; put it back, or give the new one another name, and so a curve of its own"
        )
    if told := told_differences(*({"sampling": of["sampling"], "reward": of["reward"]} for of in (before, settings))):
        log.warning(
            "validation.benchmarks.%s: its scores up to step %d were made with other settings (%s), so they and those "
            "from here on, and train.keep_best between them, compare different things",
            *(name, steps[-1], told),
        )


def _beside(path: Path) -> Path:
    """Return the path of the file that keeps the settings of the responses in `path`."""
    return path.with_suffix(".settings.json")


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Begin the file of a benchmark's responses. Leave it as it is where it was begun with the same settings."""
    beside = _beside(path)
    try:
        if read_json(beside) == settings:
            return
    except (OSError, ValueError):
        pass
    path.unlink(missing_ok=True)
    write_settings(beside, settings)


def _warn(benchmark: Benchmark, temperature: float, trained: Set[str]) -> None:
    """Warn of settings that are hardly meant. trained: texts of the prompts of training."""
    if temperature == 0 and benchmark.section.samples > 1:
        log.warning(
            "validation.temperature 0 is greedy, so all samples of a prompt are alike; samples = 1 of %s is enough",
            benchmark.name,
        )
    if known := sum(prompt.text in trained for prompt in benchmark.prompts):
        log.warning(
            "%d of %d prompts of validation.benchmarks.%s are in data.train too, and say what was learned by heart",
            *(known, len(benchmark.prompts), benchmark.name),
        )
