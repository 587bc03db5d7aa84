"""Defines benchmarks: files of prompts with answers, of `megatron-rl evaluate` and of the validation inside a run."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from megatron_rl.config.data import PromptSection
from megatron_rl.config.reward import BenchmarkKindName, JudgeSection, RewardSection
from megatron_rl.config.section import Fraction, Positive, Section, Temperature


class BenchmarkSection(PromptSection):
    path: Path = Field(description="JSONL file of {domain, prompt, answer}.")
    reward: BenchmarkKindName | None = Field(
        default=None,
        description="How the answers of this benchmark are judged, by this rule alone. Values are those of "
        'reward.kind, and "choice": the letter of a multiple choice. Default: as in training, by reward.kind, '
        "reward.domains, reward.parts and reward.judge.",
    )
    samples: Positive = Field(default=1, description="Number of responses per prompt: k of avg@k.")
    prompts: Positive | None = Field(default=None, description="Number of prompts, from the first on. Default: all.")
    pass_at: tuple[Positive, ...] = Field(
        default=(), description="Values of k for pass@k and maj@k, at most samples. Default: 1, 2, 4, ... and samples."
    )

    @property
    def at(self) -> tuple[int, ...]:
        """Return every k of pass@k and maj@k, in order."""
        powers = (2**i for i in range(self.samples.bit_length()))
        return tuple(sorted(set(self.pass_at or (*powers, self.samples))))

    def reward_of(self, reward: RewardSection) -> RewardSection:
        """Return the section by which this benchmark is judged, where `reward` is that of all. It is not validated
        again: "choice" is for evaluation alone."""
        if self.reward is None:
            return reward
        alone = {"kind": self.reward, "domains": {}, "parts": {}, "correct_part": "", "judge": JudgeSection()}
        return reward.model_copy(update=alone)

    @model_validator(mode="after")
    def _check_pass_at(self) -> "BenchmarkSection":
        if self.at[-1] > self.samples:
            raise ValueError(f"pass_at {self.at[-1]} is more than samples {self.samples}; raise samples")
        return self


Benchmarks = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], BenchmarkSection],
    Field(min_length=1, description="Benchmarks by name. The result files have the same names."),
]


class ValidationSection(Section):
    """Names benchmarks that a run answers now and then, on its own servers. By default they are sampled as in
    `evaluate`; prompts and responses may be as long as the run's."""

    every: Positive = Field(
        description="Number of steps between validations. The weights at the start and at the end are validated too."
    )
    samples: Positive = Field(
        default=1, description="Number of responses per prompt, for benchmarks that do not set it."
    )
    temperature: Temperature = Field(default=1.0, description="Sampling temperature. 0: greedy decoding.")
    top_p: Fraction = Field(
        default=0.95,
        description="Nucleus sampling: probability mass of the tokens to sample from. Training always uses 1, because "
        "it needs the log-prob of every token.",
    )
    benchmarks: Benchmarks

    @model_validator(mode="before")
    @classmethod
    def _fill_in_samples(cls, values: Any) -> Any:
        benchmarks = values.get("benchmarks") if isinstance(values, dict) else None
        if not isinstance(benchmarks, dict) or "samples" not in values:
            return values
        filled = {
            name: {"samples": values["samples"], **section} if isinstance(section, dict) else section
            for name, section in benchmarks.items()
        }
        return values | {"benchmarks": filled}

    def is_due(self, num_steps: int, last: int) -> bool:
        """Tell whether the weights after `num_steps` completed steps are validated. last: steps of the run."""
        return num_steps % self.every == 0 or num_steps == last
