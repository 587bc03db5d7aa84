"""Defines the section `optimizer`."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Section


class OptimizerSection(Section):
    learning_rate: float = Field(default=3e-6, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description='Learning-rate schedule after warm-up. "constant": no decay. "cosine": decay to min_learning_rate '
        "at the end of the run.",
    )
    min_learning_rate: float = Field(default=0.0, ge=0, description="Learning rate at the end of the cosine schedule.")
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Number of optimizer steps over which the learning rate rises linearly. The first step has "
        "learning rate 0.",
    )
    warmup_share: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of all optimizer steps that are warm-up, rounded to whole steps. Use it instead of "
        "warmup_steps.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay rate of AdamW's first moment, the mean of gradients."
    )
    beta2: float = Field(
        default=0.95, ge=0, lt=1, description="Decay rate of AdamW's second moment, the mean of squared gradients."
    )
    epsilon: float = Field(
        default=1e-8, gt=0, description="Term that AdamW adds to the denominator for numerical stability."
    )
    clip_grad: float = Field(
        default=1.0,
        ge=0,
        description="Maximum global gradient norm; larger gradients are scaled down to it. 0: no clipping.",
    )
    offload_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the optimizer states (moments, and float32 weights beside bfloat16 ones) that is kept "
        "in host memory. They are moved to the GPU part by part for the optimizer step.",
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
