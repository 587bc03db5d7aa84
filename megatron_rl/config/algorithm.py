"""The section `algorithm`."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Fraction, Positive, Section


class AlgorithmSection(Section):
    """One of c3po/algorithms.py, whose parts may be replaced one by one; the rest of the objective beside it."""

    name: Literal["c3po", "grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo"] = "c3po"
    advantage: Literal["standardised", "centred", "leave_one_out"] | None = Field(
        default=None, description="replaces the algorithm's own"
    )
    surrogate: Literal["clip", "cispo", "plain"] | None = Field(
        default=None, description="replaces the algorithm's own"
    )
    ratio: Literal["token", "sequence"] | None = Field(default=None, description="replaces the algorithm's own")
    clip_low: Fraction | None = Field(default=None, description="eps of the lower clip end; default: the algorithm's")
    clip_high: float | None = Field(default=None, gt=0, description="eps of the upper clip end; the algorithm's")
    dynamic_sampling: bool | None = Field(
        default=None, description="drop groups whose rewards are all equal and sample others; default: the algorithm's"
    )
    entropy_coefficient: float = Field(default=5e-4, ge=0, description="a_ent of Eq. 6; the bonus is subtracted")
    kl_coefficient: float = Field(default=0.0, ge=0, description="beta of Eq. 2, against the starting weights")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    optimizer_steps_per_rollout: Positive = 1
    old_logprobs: Literal["rollout", "train"] | None = Field(
        default=None,
        description="what the ratio of a token refers to that the present weights did not sample: the sampler's "
        "recorded log-prob, or the trainer's own at the start of the phase (an extra pass when a phase has several "
        "optimizer steps). Default: train with a correction, else rollout",
    )
    correction: Literal["none", "icepop", "kpop", "tis"] = Field(
        default="none", description="weights for tokens about which sampler and trainer disagree: c3po/correction.py"
    )
    icepop_low: float = Field(default=0.5, gt=0, lt=1)
    icepop_high: float = Field(default=5.0, gt=1)
    kpop_limit: float = Field(default=0.1, gt=0)
    tis_cap: float = Field(default=2.0, ge=1)

    @model_validator(mode="after")
    def _check_old_logprobs(self) -> "AlgorithmSection":
        if self.correction != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f"correction {self.correction!r} compares the trainer's log-probs with the sampler's, so old_logprobs "
                "must be 'train'; leave it out"
            )
        return self

    @property
    def trains_on_own_old_logprobs(self) -> bool:
        return self.correction != "none" or self.old_logprobs == "train"
