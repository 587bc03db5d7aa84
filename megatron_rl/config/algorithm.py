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
        description="Preset of advantage, surrogate, ratio, loss normalisation, clip range and dynamic sampling. Only "
        "c3po has a token budget.",
    )
    advantage: Annotated[str, among(ADVANTAGE_NAMES)] | None = Field(
        default=None,
        description='Advantage estimator, instead of the preset\'s. "standardised": (R - group mean) / group '
        'standard deviation. "centred": R - group mean. "leave_one_out": R - mean of the others of the group. '
        '"batch_standardised": as standardised, over all responses of a phase. Or "file.py:function" of your own '
        "(docs/own_algorithm.md).",
    )
    surrogate: Annotated[str, among(SURROGATE_NAMES)] | None = Field(
        default=None,
        description="Policy-gradient surrogate, instead of the preset's. \"clip\": PPO's clipped objective. "
        '"cispo": log-prob times advantage, weighted by the clipped ratio as a constant. "plain": ratio times '
        'advantage, without clipping. Or "file.py:function" of your own (docs/own_algorithm.md).',
    )
    ratio: Literal["token", "sequence"] | None = Field(
        default=None,
        description='Level of the importance ratio, instead of the preset\'s. "token": one ratio per token. '
        '"sequence": the geometric mean over a response.',
    )
    clip_low: Fraction | None = Field(
        default=None, description="Lower clip epsilon: the ratio is clipped at 1 - clip_low. Default: the preset's."
    )
    clip_high: float | None = Field(
        default=None,
        gt=0,
        description="Upper clip epsilon: the ratio is clipped at 1 + clip_high. Default: the preset's.",
    )
    dynamic_sampling: bool | None = Field(
        default=None,
        description="Drops groups whose rewards are all equal, and samples further prompts instead. Default: the "
        "preset's.",
    )
    entropy_coefficient: float = Field(
        default=5e-4,
        ge=0,
        description="Coefficient of the entropy bonus: a_ent in Eq. 6 of the C3PO paper. The bonus is subtracted from "
        "the loss.",
    )
    kl_coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the KL penalty against the starting weights: beta in Eq. 2 of the C3PO paper. 0: "
        "no penalty.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="Estimator of the KL penalty. With d = log-prob under the starting weights - log-prob under the "
        'present weights, "k1" is -d, "k2" is d^2 / 2 and "k3" is exp(d) - 1 - d.',
    )
    optimizer_steps_per_rollout: Positive = Field(
        default=1, description="Number of optimizer steps that the responses of one rollout phase are divided into."
    )
    passes_per_rollout: Positive = Field(
        default=1,
        description="Number of training passes over the responses of one rollout phase (num_iterations in TRL). Each "
        "pass has optimizer_steps_per_rollout steps.",
    )
    old_logprobs: Literal["rollout", "train"] | None = Field(
        default=None,
        description='Old log-prob in the ratio, for tokens that the present weights did not sample. "rollout": the '
        'one that the sampler recorded. "train": the trainer\'s own at the start of the phase; costs an extra '
        'forward pass when a phase has several optimizer steps. Default: "train" with a correction, else "rollout".',
    )
    correction: Annotated[str, among(CORRECTION_NAMES)] = Field(
        default="none",
        description="Off-policy correction: a weight for each token by the ratio of trainer to sampler probability. "
        '"none": no correction. "icepop": the ratio, or 0 outside of [icepop_low, icepop_high]. "kpop": 1, or 0 where '
        'kpop_limit is exceeded. "tis": the ratio, at most tis_cap. "sequence_tis": the ratio of the whole response, '
        'at most tis_cap. Or "file.py:function" of your own (docs/own_algorithm.md).',
    )
    icepop_low: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description='Lower bound of the trainer-to-sampler ratio for correction = "icepop". Tokens below it carry no '
        "loss.",
    )
    icepop_high: float = Field(
        default=5.0,
        gt=1,
        description='Upper bound of the trainer-to-sampler ratio for correction = "icepop". Tokens above it carry no '
        "loss.",
    )
    kpop_limit: float = Field(
        default=0.1,
        gt=0,
        description="Maximum binary KL divergence, in either direction, between a token's probabilities under trainer "
        'and sampler, for correction = "kpop". Tokens above it carry no loss.',
    )
    tis_cap: float = Field(
        default=2.0, ge=1, description='Upper bound of the weights of correction = "tis" and "sequence_tis".'
    )
    mask_truncated: bool = Field(
        default=False,
        description="Responses that are cut off at rollout.max_response_tokens carry no loss. They still count in the "
        "advantages of their group and in the budget.",
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
