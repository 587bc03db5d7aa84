"""Defines the section `train`, of both kinds of training."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_rl.config.section import Positive, Section

# A file of earlier versions has a truth value.
Recompute = Annotated[
    Literal["none", "selective", "full"],
    BeforeValidator(lambda value: ("full" if value else "none") if isinstance(value, bool) else value),
]


# The modules of local layers that megatron-core 0.19.2 can recompute. To recompute norms alone, it needs
# Transformer Engine.
RecomputeModule = Literal["core_attn", "mlp", "moe", "shared_experts"]


class TrainSection(Section):
    """Holds what the training of SFT and RL runs shares."""

    overlap: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Overlaps data-parallel communication with computation: gradients are summed during the backward "
        'pass of the last micro-batch, and new weights are gathered during the next forward pass. "auto": on with '
        "several data-parallel ranks on GPUs.",
    )
    overlap_bucket_parameters: Positive | None = Field(
        default=None,
        description="Number of parameters per communication bucket with overlap. Default: megatron-core's, 40 "
        "million, or a million for each data-parallel rank where that is more.",
    )

    micro_batch_tokens: Positive = Field(
        description="Maximum number of tokens of a micro-batch on one rank. parallel.context ranks share a "
        "micro-batch, and a sequence may be as long as what they hold together. Padding to multiples of 2 x context "
        "and of tensor is not counted."
    )
    save_every: int = Field(
        default=0,
        ge=0,
        description="Number of steps between checkpoints. 0: only those of save_minutes, and one at the end.",
    )
    save_minutes: float = Field(
        default=30.0,
        ge=0,
        description="Minutes since the last checkpoint, or the start, after which a step ends with a checkpoint, in "
        "addition to those of save_every. 0: only those of save_every.",
    )

    @property
    def has_checkpoints(self) -> bool:
        """Tell whether there are any checkpoints before the end."""
        return self.save_every > 0 or self.save_minutes > 0

    keep_last: Positive = Field(default=2, description="Number of newest checkpoints that are kept.")
    keep_every: int = Field(
        default=0, ge=0, description="Checkpoints whose step is a multiple of this number are kept for ever. 0: none."
    )
    async_save: bool = Field(
        default=True,
        description="Writes checkpoints in the background while training goes on. Needs host memory for a copy of "
        "what a rank writes. At most one is written at a time.",
    )
    on_save_error: Literal["stop", "continue"] = Field(
        default="stop",
        description='What happens when a checkpoint cannot be written (a full disk). "stop": the run ends. '
        '"continue": a warning, counted in num_failed_saves. The last good checkpoint stays either way.',
    )
    phase_deadline_seconds: float = Field(
        default=3600.0,
        gt=0,
        description="Time limit of one phase (rollout, train, save, ...) on a rank, in seconds. Beyond it the rank "
        "writes its stacks to run_dir/stacks, and the run ends. It also limits the first wait for all ranks.",
    )
    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        description="Maximum number of optimizer steps in a row that are skipped because loss or gradient is not "
        "finite. One more stops the run. In RL the skipped batches are written to run_dir/skipped.",
    )
    grad_norm_alarm: float = Field(
        default=10.0,
        gt=1,
        description="Factor of the median gradient norm of the last 50 steps above which a step raises an alarm.",
    )
    reward_alarm: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of the best reward so far (a mean of ten steps) below which three steps in a row raise an "
        "alarm. 0: no alarm.",
    )


class RlTrainSection(TrainSection):
    steps: Positive = Field(description="Number of steps. A step is a rollout phase and the training on it.")
    offload_while_generating: bool = Field(
        default=False,
        description="Moves gradients and optimizer states to host memory while the servers generate. Needs "
        "rollout.release_memory.",
    )
    free_memory_deadline_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Time limit for training to wait for GPU memory that servers release, in seconds.",
    )
    keep_best: str = Field(
        default="",
        description="Name of the validation benchmark that picks the best checkpoint. Every validated step then has a "
        'checkpoint, and the one with the best mean score is kept beside the newest. "": none.',
    )
    traced_groups: int = Field(
        default=1,
        ge=0,
        description="Number of groups per step, the first ones sampled, whose tokens are written to run_dir/tokens "
        "with the log-probs of server and trainer (docs/traces.md). It takes about 30 bytes of disk per token. 0: "
        "none.",
    )


class SftTrainSection(TrainSection):
    steps: Positive | None = Field(
        default=None, description="Number of optimizer steps. Either this or epochs is required."
    )
    epochs: Positive | None = Field(
        default=None,
        description="Number of epochs, instead of steps. An epoch is as many chats as all files of data.train hold "
        "together. Each ends with a checkpoint and a Hugging Face directory run_dir/epochs/epoch_N.",
    )
    validate_every: int = Field(
        default=0,
        ge=0,
        description="Number of steps between validations. There is one at the end of each epoch and of the run too. "
        "0: only those.",
    )

    @model_validator(mode="after")
    def _check_length(self) -> "SftTrainSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either train.steps or train.epochs, not both and not neither")
        return self
