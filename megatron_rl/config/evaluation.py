"""The configuration of `megatron-rl evaluate`: it knows nothing of training, so that it serves any model."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from megatron_rl.config.data import PromptSection
from megatron_rl.config.model import ServedModelSection
from megatron_rl.config.reward import BenchmarkKindName, JudgeSection, RewardSection
from megatron_rl.config.rollout import GenerationSection, RolloutSection, check_servers
from megatron_rl.config.schema import CommandConfig
from megatron_rl.config.section import Fraction, Positive


class BenchmarkSection(PromptSection):
    path: Path = Field(description="JSONL of {domain, prompt, answer}")
    reward: BenchmarkKindName | None = Field(
        default=None,
        description="how its answers are judged, by these rules alone; choice: the letter of a multiple choice. "
        "Default: as in training, by reward.kind, reward.domains, reward.parts and reward.judge",
    )
    samples: Positive = Field(default=1, description="k of avg@k: how often each prompt is sampled")
    prompts: Positive | None = Field(default=None, description="the first so many; default: all")
    pass_at: tuple[Positive, ...] = Field(
        default=(), description="k of pass@k and maj@k, at most samples; default: 1, 2, 4, ... and samples"
    )

    @property
    def at(self) -> tuple[int, ...]:
        """Every k of pass@k and maj@k, in order."""
        powers = (2**i for i in range(self.samples.bit_length()))
        return tuple(sorted(set(self.pass_at or (*powers, self.samples))))

    def reward_of(self, reward: RewardSection) -> RewardSection:
        """How this benchmark is judged, where `reward` is that of all. Not validated again: "choice" is for evaluation
        alone."""
        if self.reward is None:
            return reward
        alone = {"kind": self.reward, "domains": {}, "parts": {}, "correct_part": "", "judge": JudgeSection()}
        return reward.model_copy(update=alone)

    @model_validator(mode="after")
    def _check_pass_at(self) -> "BenchmarkSection":
        if self.at[-1] > self.samples:
            raise ValueError(f"pass_at {self.at[-1]} is more than samples {self.samples}; raise samples")
        return self


class EvaluationSampling(GenerationSection):
    """The defaults are those of Ring-lite's evaluation; temperature 1.0 too."""

    max_prompt_tokens: Positive = Field(default=4096, description="longer prompts are refused before anything starts")
    max_response_tokens: Positive = Field(default=32768, description="longer responses are cut off there")
    top_p: Fraction = Field(default=0.95, description="training samples at 1.0, since it needs every token's log-prob")

    def as_rollout(self) -> RolloutSection:
        """For servers and sampler: every response is a group of its own."""
        return RolloutSection(prompts_per_step=1, samples_per_prompt=1, **self.model_dump(exclude={"top_p"}))


class EvaluateConfig(CommandConfig):
    """`megatron-rl evaluate`."""

    seed: int = Field(default=1, ge=0, description="of what is sampled")
    model: ServedModelSection
    rollout: EvaluationSampling = EvaluationSampling()
    reward: RewardSection = RewardSection()
    benchmarks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], BenchmarkSection] = Field(
        min_length=1, description="by name, which names the files of the results too"
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        check_servers(self.rollout)
        return self
