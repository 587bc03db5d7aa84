"""Defines the section `algorithm`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.names import among
from megatron_rl.config.section import Fraction, Positive, Section

ADVANTAGE_NAMES = ("standardised", "centred", "leave_one_out", "batch_standardised")
SURROGATE_NAMES = ("clip", "cispo", "plain")
CORRECTION_NAMES = ("none", "icepop", "kpop", "tis", "sequence_tis")


class AlgorithmSection(Section):
    """Names an algorithm of c3po/algorithms.py, whose parts may be replaced one by one, and the rest of the
    objective."""

    name: Literal["c3po", "grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp"] = Field(
        default="c3po",
        description="advantage, surrogate, ratio, normalisation and clip range together; c3po alone has a token budget",
    )
    advantage: Annotated[str, among(ADVANTAGE_NAMES)] | None = Field(
        default=None,
        description="replaces the algorithm's own: standardised, centred, leave_one_out, batch_standardised, or "
        '"file.py:function", which is yours (docs/own_algorithm.md)',
    )
    surrogate: Annotated[str, among(SURROGATE_NAMES)] | None = Field(
        default=None,
        description='replaces the algorithm\'s own: clip, cispo, plain, or "file.py:function", which is yours',
    )
    ratio: Literal["token", "sequence"] | None = Field(default=None, description="replaces the algorithm's own")
    clip_low: Fraction | None = Field(default=None, description="eps of the lower clip end; default: the algorithm's")
    clip_high: float | None = Field(default=None, gt=0, description="eps of the upper clip end; the algorithm's")
    dynamic_sampling: bool | None = Field(
        default=None, description="drop groups whose rewards are all equal and sample others; default: the algorithm's"
    )
    entropy_coefficient: float = Field(default=5e-4, ge=0, description="a_ent of Eq. 6; the bonus is subtracted")
    kl_coefficient: float = Field(default=0.0, ge=0, description="beta of Eq. 2, against the starting weights")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="of the KL term: with d the log-prob of a token under the starting weights less the present one, "
        "k1 is -d, k2 d^2 / 2 and k3 exp(d) - 1 - d",
    )
    optimizer_steps_per_rollout: Positive = Field(
        default=1, description="into how many optimizer steps the responses of a phase are divided"
    )
    passes_per_rollout: Positive = Field(
        default=1,
        description="how often the responses of a phase are trained, each time in so many optimizer steps; others call "
        "it num_iterations",
    )
    old_logprobs: Literal["rollout", "train"] | None = Field(
        default=None,
        description="what the ratio of a token refers to that the present weights did not sample: the sampler's "
        "recorded log-prob, or the trainer's own at the start of the phase (an extra pass when a phase has several "
        "optimizer steps). Default: train with a correction, else rollout",
    )
    correction: Annotated[str, among(CORRECTION_NAMES)] = Field(
        default="none",
        description="weights for tokens about which sampler and trainer disagree: c3po/correction.py; "
        '"file.py:function" is yours. One of none, icepop, kpop, tis, sequence_tis',
    )
    icepop_low: float = Field(
        default=0.5, gt=0, lt=1, description="of icepop: tokens whose ratio of trainer to sampler is below have no loss"
    )
    icepop_high: float = Field(default=5.0, gt=1, description="of icepop: likewise those whose ratio is above")
    kpop_limit: float = Field(
        default=0.1,
        gt=0,
        description="of kpop: the most that the binary KL divergence of a token's probabilities under trainer and "
        "sampler may be, either way; other tokens have no loss",
    )
    tis_cap: float = Field(default=2.0, ge=1, description="of tis and sequence_tis")
    mask_truncated: bool = Field(
        default=False,
        description="responses that were cut off at rollout.max_response_tokens carry no loss; they count in their "
        "group's advantages, and in the budget",
    )

    @model_validator(mode="after")
    def _check_old_logprobs(self) -> "AlgorithmSection":
        if self.correction != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f"correction {self.correction!r} compares the trainer's log-probs with the sampler's, so old_logprobs "
                "must be 'train'; leave it out"
            )
        return self

    @property
    def optimizer_steps_of_phase(self) -> int:
        """Count the optimizer steps of all passes together."""
        return self.optimizer_steps_per_rollout * self.passes_per_rollout

    @property
    def trains_on_own_old_logprobs(self) -> bool:
        return self.correction != "none" or self.old_logprobs == "train"
