"""Defines the configuration of `megatron-rl evaluate`: it knows nothing of training, so that it serves any model."""

from pydantic import Field, model_validator

from megatron_rl.config.agents import AgentKeys
from megatron_rl.config.benchmarks import Benchmarks
from megatron_rl.config.model import ServedModelSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import GenerationSection, RolloutSection, check_servers
from megatron_rl.config.schema import CommandConfig
from megatron_rl.config.section import Fraction, Positive


class EvaluationSampling(GenerationSection, AgentKeys):
    """Says how benchmarks are sampled. The defaults are those of Ring-lite's evaluation; temperature 1.0 too."""

    max_prompt_tokens: Positive = Field(
        default=4096,
        description="Maximum length of a prompt, in tokens. Longer prompts are refused before anything starts.",
    )
    max_response_tokens: Positive = Field(
        default=32768, description="Maximum length of a response, in tokens. Longer responses are cut off."
    )
    top_p: Fraction = Field(
        default=0.95,
        description="Nucleus sampling: probability mass of the tokens to sample from. Training always uses 1, because "
        "it needs the log-prob of every token.",
    )

    def as_rollout(self) -> RolloutSection:
        """Return the section for servers and sampler, where every response is a group of its own."""
        return RolloutSection(prompts_per_step=1, samples_per_prompt=1, **self.model_dump(exclude={"top_p"}))


class EvaluateConfig(CommandConfig):
    """Configures `megatron-rl evaluate`."""

    seed: int = Field(default=1, ge=0, description="Random seed for sampling.")
    model: ServedModelSection
    rollout: EvaluationSampling = EvaluationSampling()
    reward: RewardSection = RewardSection()
    benchmarks: Benchmarks

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        check_servers(self.rollout)
        return self
