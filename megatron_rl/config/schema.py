"""Defines the configuration tree. Field descriptions are the reference; `load.py` reads it from TOML.

Nothing here imports torch or megatron, so a wrong configuration is refused in a fraction of a second.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.benchmarks import ValidationSection
from megatron_rl.config.budget import BudgetSection
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.data import RlData, SftData
from megatron_rl.config.distillation import DistillationSection
from megatron_rl.config.endpoints import TeacherSection
from megatron_rl.config.limits import impossible, with_first_phase
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.model import ModelSection, MoeSection, ServedModelSection, ServingSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.parallel import ParallelSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection, check_servers
from megatron_rl.config.section import Section
from megatron_rl.config.sync import SyncSection
from megatron_rl.config.tracking import TrackingSection
from megatron_rl.config.train import RlTrainSection, SftTrainSection, TrainSection

SEED = "Random seed for the order of the data, for sampling, and for newly initialised parameters of a model."


class CommandConfig(Section):
    """Holds what a file of any kind may say."""

    cluster: ClusterSection | None = None


class RunConfig(CommandConfig):
    """Holds what SFT and RL runs share."""

    run_dir: Path = Field(description="Directory for everything that the run writes.")
    seed: int = Field(default=1, ge=0, description=SEED)
    threads: int = Field(
        default=0,
        ge=0,
        description="Number of torch threads per training rank. 0: the machine's cores divided evenly among its ranks.",
    )
    model: ModelSection
    lora: LoraSection | None = Field(
        default=None,
        description="Trains LoRA adapters beside frozen weights. Without this section all weights are trained.",
    )
    parallel: ParallelSection = ParallelSection()
    moe: MoeSection = MoeSection()
    optimizer: OptimizerSection = OptimizerSection()
    tracking: TrackingSection = TrackingSection()
    train: TrainSection

    @property
    def micro_batch_cap(self) -> int:
        """Return the most tokens of one micro-batch over all the context-parallel ranks that share it."""
        return self.train.micro_batch_tokens * self.parallel.context


class SftConfig(RunConfig):
    """Configures `megatron-rl sft`: cross-entropy over packed chats."""

    train: SftTrainSection
    data: SftData

    @model_validator(mode="after")
    def _check(self) -> "SftConfig":
        if self.train.steps is not None:
            self.check_warmup(self.train.steps)
        if self.train.validate_every and self.data.validation is None:
            raise ValueError(
                f"train.validate_every {self.train.validate_every} has nothing to validate on; set data.validation"
            )
        return self

    def check_warmup(self, num_steps: int) -> None:
        """Raise ValueError when warmup leaves none of the run's optimizer steps, which without train.steps only the
        data say."""
        if self.optimizer.warmup_steps >= num_steps:
            known = f"train.steps {num_steps}" if self.train.steps else f"the {num_steps} steps of train.epochs"
            raise ValueError(f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below {known}")


class RolloutPhase(CommandConfig):
    """Configures the sampling and scoring of training prompts, whichever model does it. It knows nothing of
    training."""

    run_dir: Path = Field(description="Directory for everything that the command writes.")
    seed: int = Field(default=1, ge=0, description=SEED)
    model: ServingSection | None = None
    data: RlData
    rollout: RolloutSection
    reward: RewardSection = RewardSection()

    @property
    def starts_servers(self) -> bool:
        return True

    @property
    def serving(self) -> ServingSection:
        """Return the section that says how servers run the model, where servers are started."""
        assert self.model is not None
        return self.model

    @model_validator(mode="after")
    def _check_sampling(self) -> "RolloutPhase":
        if self.starts_servers:
            if self.model is None:
                raise ValueError("model is required, a checkpoint to sample from; or teacher, an endpoint that answers")
            check_servers(self.rollout)
        if self.rollout.temperature == 0 and self.rollout.samples_per_prompt > 1:
            raise ValueError(
                f"rollout.temperature 0 makes the {self.rollout.samples_per_prompt} responses of a prompt "
                "(rollout.samples_per_prompt) all alike, and nothing is learned from that; set a temperature above 0"
            )
        longest = self.rollout.max_response_tokens
        if self.reward.overlong_buffer_tokens > longest:
            raise ValueError(
                f"reward.overlong_buffer_tokens {self.reward.overlong_buffer_tokens} must be at most "
                f"rollout.max_response_tokens {longest}"
            )
        return self


class SamplingConfig(RolloutPhase):
    """Configures `megatron-rl rollout`: sampled and scored responses to training prompts."""

    model: ServedModelSection | None = None
    teacher: TeacherSection | None = Field(
        default=None,
        description="OpenAI-compatible endpoint that answers instead of `model`, which may then be left out.",
    )

    @property
    def starts_servers(self) -> bool:
        return self.teacher is None


class RlConfig(RunConfig, SamplingConfig):
    """Configures `megatron-rl train`, and `rollout` of its rollout phase alone."""

    model: ModelSection
    teacher: None = None  # training needs responses of its own policy
    train: RlTrainSection
    budget: BudgetSection = BudgetSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    sync: SyncSection = SyncSection()
    distillation: DistillationSection | None = Field(
        default=None, description="Teacher policy that scores the sampled responses. Not set: no teacher."
    )
    validation: ValidationSection | None = Field(
        default=None, description="Benchmarks that the run evaluates every few steps. Not set: no validation."
    )

    @property
    def probe_tolerance(self) -> float:
        return self.sync.probe_tolerance or (1e-3 if self.model.dtype == "float32" else 0.1)

    @property
    def logprob_tolerance(self) -> float:
        """Return `rollout.logprob_tolerance`, or what rounding to the type of the model may differ by. Other weights
        differ by several nats; bfloat16 moved one token in a thousand of a small model by 0.5."""
        return self.rollout.logprob_tolerance or (0.5 if self.model.dtype == "float32" else 2.0)

    @model_validator(mode="before")
    @classmethod
    def _refuse_teacher(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("teacher") is not None:
            raise ValueError(
                "teacher is for `megatron-rl rollout` with a configuration without budget, train, optimizer and "
                "algorithm; training needs responses of its own policy, with their log-probs: make SFT rows of what "
                "the teacher answers (docs/distillation.md), or name a checkpoint with the same tokenizer in "
                "[distillation], which scores what the policy samples (docs/joint.md)"
            )
        return values

    @model_validator(mode="before")
    @classmethod
    def _size_first_phase(cls, values: Any) -> Any:
        """Fill in rollout.prompts_per_step where the budget decides how many prompts a phase takes and the file names
        none."""
        return with_first_phase(values)

    @model_validator(mode="after")
    def _check_budget(self) -> "RlConfig":
        if self.has_budget and not self.budget.tokens:
            raise ValueError(
                "budget.tokens is required: the response tokens that an optimizer step trains; "
                f"{self.rollout.prompts_per_step} prompts x {self.rollout.samples_per_prompt} responses of half the "
                f"longest length have {self.half_length_tokens:,}"
            )
        return self

    @property
    def half_length_tokens(self) -> int:
        """Count the tokens of the responses of a phase, if each has half of the longest length."""
        rollout = self.rollout
        return rollout.prompts_per_step * rollout.samples_per_prompt * max(1, rollout.max_response_tokens // 2)

    @model_validator(mode="after")
    def _check_sync(self) -> "RlConfig":
        if self.sync.transport == "ipc" and self.rollout.engine != "sglang":
            raise ValueError(
                "sync.transport 'ipc' is for SGLang servers that this run starts; set rollout.engine = 'sglang' and "
                "leave rollout.urls empty, or take 'distributed' or 'disk'"
            )
        if self.sync.backend == "nccl" and self.rollout.engine != "sglang":
            raise ValueError(
                f"sync.backend 'nccl' is for SGLang servers on GPUs, rollout.engine is {self.rollout.engine!r}; set "
                "sync.backend = 'auto'"
            )
        if self.rollout.urls:
            for problem in self.sharing_problems(attached=True):
                raise ValueError(problem)
        if self.train.offload_while_generating and not self.rollout.release_memory:
            raise ValueError(
                "train.offload_while_generating makes room for servers that give it back; set "
                "rollout.release_memory = true too, or this one to false"
            )
        return self

    @model_validator(mode="after")
    def _check_keep_best(self) -> "RlConfig":
        best, known = self.train.keep_best, self.validation.benchmarks if self.validation else {}
        if best and best not in known:
            remedy = f"take one of {', '.join(known)}" if known else f"write [validation.benchmarks.{best}]"
            raise ValueError(f"train.keep_best {best!r} is no benchmark of validation; {remedy}")
        return self

    def is_validated(self, num_steps: int) -> bool:
        """Tell whether the weights after `num_steps` completed steps answer the benchmarks of validation."""
        return self.validation is not None and self.validation.is_due(num_steps, self.train.steps)

    def sharing_problems(self, attached: bool) -> Iterator[str]:
        """Tell which settings do not go together with the place of the servers. attached: they are at rollout.urls or
        in steps of their own; else this run starts them, on the GPUs that it trains on."""
        if attached and self.sync.transport == "ipc":
            yield (
                "sync.transport 'ipc' is for SGLang servers that this run starts, on the GPUs that it trains on; leave "
                "rollout.urls empty, or take 'distributed' or 'disk'"
            )
        if attached and self.rollout.release_memory:
            yield (
                "rollout.release_memory is for servers that this run starts, on the GPUs that it trains on; leave "
                "rollout.urls empty, or set it to false"
            )
        if not attached and self.sync.transport == "distributed" and self.sync.backend == "nccl":
            yield (
                "sync.backend 'nccl' is for servers on GPUs of their own: this run starts its servers on the GPUs that "
                "it trains on, and NCCL refuses a group with two members on one GPU; set sync.transport = 'ipc', or "
                "sync.backend = 'auto', which takes gloo"
            )

    @property
    def has_budget(self) -> bool:
        """Tell whether optimizer steps are filled up to budget.tokens. c3po/algorithms.py has all of each algorithm."""
        return self.algorithm.name == "c3po"

    @model_validator(mode="after")
    def _check_limits(self) -> "RlConfig":
        for problem in impossible(self):
            raise ValueError(problem)
        return self

    def phase_budgets(self, num_training_ranks: int) -> tuple[int, ...]:
        """Return Phi of every optimizer step of one rollout phase, in tokens."""
        scale = num_training_ranks if self.budget.scope == "per_gpu" else 1
        return (self.budget.tokens * scale,) * self.algorithm.optimizer_steps_per_rollout
