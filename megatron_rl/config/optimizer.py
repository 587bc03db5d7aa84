"""Defines the section `optimizer`."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Section


class OptimizerSection(Section):
    learning_rate: float = Field(default=3e-6, gt=0, description="of AdamW, the highest of its schedule")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="the learning rate after the warm-up: the same to the end, or a half wave of a cosine down to "
        "min_learning_rate",
    )
    min_learning_rate: float = Field(default=0.0, ge=0, description="where the cosine ends")
    warmup_steps: int = Field(
        default=0, ge=0, description="optimizer steps over which the learning rate rises linearly; the first has 0"
    )
    warmup_share: float | None = Field(
        default=None, ge=0, lt=1, description="instead of warmup_steps: their share of all optimizer steps, rounded"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW, apart from the gradient")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of AdamW's mean of gradients")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of AdamW's mean of squared gradients")
    epsilon: float = Field(default=1e-8, gt=0, description="what AdamW adds to the root that it divides by")
    clip_grad: float = Field(default=1.0, ge=0, description="global gradient norm limit; 0 is no clipping")
    offload_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="of the optimizer's states (moments, and fp32 weights beside bfloat16 ones) that live in host "
        "memory and are on the device only while they are stepped, a part after the other",
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "OptimizerSection":
        if self.warmup_steps and self.warmup_share is not None:
            raise ValueError(
                f"set either warmup_steps or warmup_share, got {self.warmup_steps} and {self.warmup_share:g}"
            )
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is where a cosine ends; set schedule = 'cosine', or "
                "leave it out"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} must be at most learning_rate {self.learning_rate:g}"
            )
        return self

    def num_warmup_steps(self, num_steps: int) -> int:
        """Count the warmup steps of `num_steps` optimizer steps. A share leaves at least one of them."""
        if self.warmup_share is None:
            return self.warmup_steps
        return min(round(self.warmup_share * num_steps), num_steps - 1)
