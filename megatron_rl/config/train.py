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
        description="data-parallel ranks add up gradients beside the backward pass of the last micro-batch, and hand "
        "each other their new weights beside the next forward pass; auto is on for several such ranks on GPUs",
    )
    overlap_bucket_parameters: Positive | None = Field(
        default=None,
        description="how many parameters travel at once with overlap; unset is megatron-core's choice, 40 million, or "
        "a million for each data-parallel rank where that is more",
    )

    micro_batch_tokens: Positive = Field(
        description="tokens that one rank may hold of a micro-batch. parallel.context ranks share a micro-batch, and a "
        "sequence may be as long as what they hold together. Padding to multiples of 2 x context and of tensor comes "
        "on top"
    )
    save_every: int = Field(
        default=0,
        ge=0,
        description="steps between checkpoints; 0: those of save_minutes alone, and one at the end",
    )
    save_minutes: float = Field(
        default=30.0,
        ge=0,
        description="a checkpoint also where the last one, or the start, is so long ago; 0: only as save_every says",
    )

    @property
    def has_checkpoints(self) -> bool:
        """Tell whether there are any checkpoints before the end."""
        return self.save_every > 0 or self.save_minutes > 0

    keep_last: Positive = Field(default=2, description="newest checkpoints that are kept")
    keep_every: int = Field(
        default=0, ge=0, description="checkpoints whose step is a multiple of this are kept for ever; 0 keeps none"
    )
    async_save: bool = Field(
        default=True,
        description="write checkpoints beside training, from a copy in memory as large as what a rank writes; at most "
        "one at a time",
    )
    on_save_error: Literal["stop", "continue"] = Field(
        default="stop",
        description="when a checkpoint cannot be written (a full disk): stop ends the run, continue warns, counts it "
        "in num_failed_saves and goes on. The last good one stays",
    )
    phase_deadline_seconds: float = Field(
        default=3600.0,
        gt=0,
        description="a rank that is longer than this in one phase (rollout, train, save, ...) writes its stacks to "
        "run_dir/stacks and ends, and the run with it. So long the first wait for all ranks may take too",
    )
    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        description="optimizer steps in a row that may be skipped for a loss or gradient that is not finite; one more "
        "stops the run. The batches of RL are in run_dir/skipped",
    )
    grad_norm_alarm: float = Field(
        default=10.0,
        gt=1,
        description="times the median gradient norm of the last 50 steps at which a step is reported",
    )
    reward_alarm: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="rewards of three steps in a row below this share of the best mean of ten steps so far are "
        "reported; 0 is off",
    )


class RlTrainSection(TrainSection):
    steps: Positive = Field(description="rollout-and-train steps")
    offload_while_generating: bool = Field(
        default=False,
        description="gradients and the optimizer's states are in host memory while the servers generate; needs "
        "rollout.release_memory",
    )
    free_memory_deadline_seconds: float = Field(
        default=60.0, gt=0, description="how long training may wait for memory that servers have released"
    )
    keep_best: str = Field(
        default="",
        description="a benchmark of validation: every validated step has a checkpoint, and the one with the best mean "
        "score so far is kept beside the newest; empty: none",
    )
    traced_groups: int = Field(
        default=1,
        ge=0,
        description="groups of every step, the first that it sampled, of whose responses each token is written "
        "to run_dir/tokens with the log-probs of server and trainer (docs/traces.md); about 30 bytes of disk per "
        "token; 0 writes none",
    )


class SftTrainSection(TrainSection):
    steps: Positive | None = Field(default=None, description="optimizer steps")
    epochs: Positive | None = Field(
        default=None,
        description="instead of steps: how often as many chats are seen as all files of data.train hold together. At "
        "the end of each there is a checkpoint, and a Hugging Face directory run_dir/epochs/epoch_N",
    )
    validate_every: int = Field(
        default=0, ge=0, description="steps between validations, besides those at the end of each epoch and of the run"
    )

    @model_validator(mode="after")
    def _check_length(self) -> "SftTrainSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either train.steps or train.epochs, not both and not neither")
        return self
