"""The configuration tree. Field descriptions are the reference; `load.py` reads it from TOML.

Nothing here imports torch or megatron, so a wrong configuration is refused in a fraction of a second.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron_rl.config.layout import Layout
from megatron_rl.config.limits import impossible
from megatron_rl.gpus import visible_gpus

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
# A file of earlier versions has a truth value.
Recompute = Annotated[
    Literal["none", "selective", "full"],
    BeforeValidator(lambda value: ("full" if value else "none") if isinstance(value, bool) else value),
]
# What servers take besides 0.
_LEAST_TEMPERATURE = 1e-6
# What megatron-core 0.19.2 can recompute of local layers; norms alone want Transformer Engine.
RecomputeModule = Literal["core_attn", "mlp", "moe", "shared_experts"]


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ClusterSection(Section):
    """The machines that a file is meant for: the defaults of `megatron-rl plan`. A start on others says so, no more."""

    nodes: Positive = 1
    gpus_per_node: Positive = Field(default=8, description="and training ranks of a node")
    serving_nodes: int = Field(default=0, ge=0, description="of the nodes, which serve only; 0: all do both")
    gpu_memory_gb: float = Field(default=80.0, ge=0, description="of 2^30 bytes; 0 asks for no verdict")
    rates: Path | None = Field(
        default=None, description="a file of simulation/rates.py, by which plan predicts the time of a step"
    )

    @property
    def training_ranks(self) -> int:
        return (self.nodes - self.serving_nodes) * self.gpus_per_node

    @model_validator(mode="after")
    def _check_nodes(self) -> "ClusterSection":
        if self.nodes <= self.serving_nodes:
            raise ValueError(
                f"nodes {self.nodes} less serving_nodes {self.serving_nodes} leaves none to train; ask for more nodes"
            )
        return self


class CommandConfig(Section):
    """What a file of any kind may say."""

    cluster: ClusterSection | None = None


class ServingSection(Section):
    """How servers run a model, whichever it is."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = Field(
        default=False,
        description="let SGLang run the Python files of the model directory; configuration_bailing_moe.py describes "
        "a model that transformers does not know",
    )
    shape: Path | None = Field(
        default=None,
        description="for `megatron-rl plan` alone, while the model itself is not there yet: a config.json of the same "
        "shape, or a folder that has one",
    )


class ServedModelSection(ServingSection):
    path: Path = Field(description="Hugging Face directory of a BailingMoE model (config.json, safetensors, tokenizer)")


class ModelSection(ServedModelSection):
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="auto takes local ones, and Transformer Engine's, which have not run on a GPU yet, only where fp8 "
        "asks for them",
    )
    attention: Literal["auto", "flash", "fa4", "sdpa"] = Field(
        default="auto",
        description="of local layers. flash: torch's variable-length flash attention, on a GPU in bfloat16; fa4: "
        "FlashAttention 4 of the package flash-attn-4, not run on a GPU yet; sdpa: torch's "
        "scaled_dot_product_attention over sequences of about the same length. auto takes flash where it can",
    )
    experts: Literal["auto", "grouped", "sequential"] = Field(
        default="auto",
        description="of local layers. grouped: all experts of a rank in two grouped matrix products of torch's own, "
        "not in float64; sequential: two products for each. auto takes grouped in bfloat16 on a GPU of compute "
        "capability 9.0 or later. Transformer Engine's layers have their own",
    )
    expert_weight_gradient: Literal["torch", "quack"] = Field(
        default="torch",
        description="of grouped experts. torch: a grouped product in bfloat16, added to the float32 gradients in a "
        "pass of its own; quack: added in the product, by the package quack-kernels, not run on a GPU yet",
    )
    router_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the router's logits and probabilities; servers may have them in bfloat16"
    )
    head_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the logits. Their products add up in float32 either way; bfloat16 rounds the sums, as servers "
        "do that have their logits in it",
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        default="none",
        description="format of the products in Transformer Engine's linear layers, weights stay bfloat16: e4m3, or "
        "hybrid, which has e5m2 for gradients",
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        default="tensorwise",
        description="where fp8's scales come from, as megatron-core names them: tensorwise from the tensor itself; "
        "delayed from earlier steps, which a checkpoint does not keep; blockwise, of 128 values; mxfp8, of 32, on "
        "Blackwell",
    )
    recompute: Recompute = Field(
        default="none",
        description="what the backward pass computes once more, to save memory. full: every layer, of which only the "
        "input is kept; selective: recompute_modules. true and false are full and none",
    )
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        default=("moe",),
        description="with selective, as megatron-core names them: core_attn, attention without its projections, which "
        "saves memory with parallel.context alone; mlp, of dense layers; moe, a layer's router and all its experts; "
        "shared_experts",
    )

    @model_validator(mode="after")
    def _check_recompute(self) -> "ModelSection":
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("recompute 'selective' recomputes nothing; name recompute_modules, or set it to 'none'")
        return self

    @model_validator(mode="after")
    def _check_dtypes(self) -> "ModelSection":
        narrow = {"router_dtype": self.router_dtype == "bfloat16", "head_dtype": self.head_dtype == "bfloat16"}
        narrow["fp8"] = self.fp8 != "none"
        for name in (name for name, asked in narrow.items() if asked and self.dtype != "bfloat16"):
            raise ValueError(
                f"{name} = '{getattr(self, name)}' needs dtype = 'bfloat16', got '{self.dtype}'; change one of them"
            )
        return self


class ParallelSection(Section):
    tensor: Positive = Field(default=1, description="tensor parallel size; above 1 sequence parallelism is on")
    pipeline: Positive = 1
    virtual_pipeline: Positive = Field(
        default=1,
        description="parts of the model on each pipeline stage (Megatron's interleaved schedule): more parts, less "
        "idling, more communication. Above 1 it needs parallel.pipeline of at least 3, and a rank runs a multiple of "
        "parallel.pipeline micro-batches, empty ones if need be",
    )
    expert: Positive = 1
    expert_tensor: Positive = 1
    context: Positive = Field(
        default=1,
        description="context parallel size: so many ranks share every sequence, each holds its part of it. Needs local "
        "layers",
    )

    def layout(self, world_size: int) -> Layout:
        return Layout(
            world_size=world_size,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            context=self.context,
        )


class OptimizerSection(Section):
    learning_rate: float = Field(default=3e-6, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    min_learning_rate: float = Field(default=0.0, ge=0, description="where the cosine ends")
    warmup_steps: int = Field(
        default=0, ge=0, description="optimizer steps over which the learning rate rises linearly; the first has 0"
    )
    warmup_share: float | None = Field(
        default=None, ge=0, lt=1, description="instead of warmup_steps: their share of all optimizer steps, rounded"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
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
        """Of `num_steps` optimizer steps. A share leaves at least one of them."""
        if self.warmup_share is None:
            return self.warmup_steps
        return min(round(self.warmup_share * num_steps), num_steps - 1)


class TrainSection(Section):
    """What SFT and RL runs share."""

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
    save_every: int = Field(default=0, ge=0, description="steps between checkpoints; 0 saves at the end only")
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


class MoeSection(Section):
    load_balance_coefficient: float = Field(default=1e-5, ge=0, description="a_bal of Eq. 6")
    z_loss_coefficient: float = Field(default=1e-7, ge=0, description="a_z of Eq. 6")


class RunConfig(CommandConfig):
    """What SFT and RL runs share."""

    run_dir: Path = Field(description="everything a run writes lands here")
    seed: int = Field(default=1, ge=0)
    threads: int = Field(default=0, ge=0, description="torch threads per training rank; 0 divides the cores evenly")
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    moe: MoeSection = MoeSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection

    @property
    def micro_batch_cap(self) -> int:
        """Tokens of one micro-batch over all the context-parallel ranks that share it."""
        return self.train.micro_batch_tokens * self.parallel.context


def _weights(train: object) -> object:
    """A file alone has weight 1."""
    if isinstance(train, str | Path):
        return {train: 1.0}
    if not isinstance(train, dict):
        raise ValueError('must be a file, or files with weights, {"a.jsonl" = 3, "b.jsonl" = 1}')
    if not train:
        raise ValueError('names no file; write {"file.jsonl" = 1}')
    return train


Weights = Annotated[dict[Path, Annotated[float, Field(gt=0)]], BeforeValidator(_weights)]


class TextSection(Section):
    """How the texts of rows become tokens."""

    special_tokens: Literal["text", "token"] = Field(
        default="text",
        description="what the tokenizer's special tokens are where a user's message has them written out, as in "
        "`<|endoftext|>`: text like any other, or the token itself",
    )


class PromptSection(TextSection):
    """How the rows of a file become prompts."""

    domain: str = Field(default="math", min_length=1, description="of rows that name none and have no tests")
    suffix: str = Field(
        default="",
        description="goes behind every prompt as it stands, such as "
        '"\\n\\nPut your final answer within \\\\boxed{}." of mathematics',
    )


TooLong = Annotated[
    Literal["stop", "drop"],
    Field(description="rows that are longer than the run's limits: stop the run at its start, or are left out"),
]


class SftData(TextSection):
    too_long: TooLong = "stop"
    train: Weights = Field(
        description="JSONL of {messages: [{role, content}, ...]}, or weights of several such files: "
        '{"math.jsonl" = 64.5, "code.jsonl" = 25.5}'
    )
    validation: Path | None = Field(
        default=None, description="the same of chats that are not trained on; their loss and token entropy are logged"
    )
    batch_tokens: Positive = Field(description="tokens per optimizer step, prompt tokens included")

    @property
    def files(self) -> list[Path]:
        return [*self.train, *([self.validation] if self.validation else [])]


class SftConfig(RunConfig):
    """`megatron-rl sft`: cross-entropy over packed chats."""

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
        """ValueError when it leaves none of the run's optimizer steps, which without train.steps only the data say."""
        if self.optimizer.warmup_steps >= num_steps:
            known = f"train.steps {num_steps}" if self.train.steps else f"the {num_steps} steps of train.epochs"
            raise ValueError(f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below {known}")


class DataStage(Section):
    """A part of training with a mixture of its own."""

    prompts: Positive | None = Field(default=None, description="after which the next stage begins; none for the last")
    train: Weights = Field(description="as data.train")


class RlData(PromptSection):
    too_long: TooLong = "stop"
    train: Weights | None = Field(
        default=None,
        description="JSONL of {domain, prompt, answer}, or weights of several such files: "
        '{"math.jsonl" = 3, "code.jsonl" = 1} takes three prompts of the first for each of the second',
    )
    stages: tuple[DataStage, ...] = Field(
        default=(),
        description="instead of train: mixtures that follow each other. They are counted in prompts, because how many "
        "prompts a step takes is up to the token budget",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> "RlData":
        if (self.train is None) == (not self.stages):
            raise ValueError("set either data.train or [[data.stages]], not both and not neither")
        if self.stages:
            *before, last = (stage.prompts for stage in self.stages)
            if last is not None or None in before:
                raise ValueError("every stage of data.stages but the last needs `prompts`, and the last has none")
        return self

    @property
    def weights_by_stage(self) -> list[tuple[int | None, Weights]]:
        """(prompts, weights by file) of every stage; prompts is None for the last."""
        return [(stage.prompts, stage.train) for stage in self.stages] or [(None, self.train or {})]

    @property
    def train_files(self) -> list[Path]:
        """Each once."""
        return list(dict.fromkeys(path for _, weights in self.weights_by_stage for path in weights))


class GenerationSection(Section):
    """Servers, and what is asked of them: what training and evaluation share."""

    engine: Literal["embedded", "sglang"] = Field(
        default="embedded",
        description="what generates: the embedded CPU server, or unmodified SGLang, which on a CPU comes from "
        "`make install-sglang` and needs model.trust_remote_code",
    )
    sglang_python: Path | None = Field(
        default=None,
        description="interpreter of an environment with sglang; default: this one if it has it, else .venv-sglang of "
        "the working directory",
    )
    sglang_arguments: tuple[str, ...] = Field(
        default=(), description="further arguments of sglang.launch_server, such as --mem-fraction-static 0.6"
    )
    urls: tuple[str, ...] = Field(
        default=(),
        description="attach to running servers instead of starting one; SGLang needs a --context-length of "
        "max_prompt_tokens + max_response_tokens + 7",
    )
    api_key_variable: str = Field(
        default="",
        description="environment variable that holds the key of the servers at urls; empty: none. Servers that the run "
        "starts get a new key from it",
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port of the first server that is started, the next count up; 0 picks",
    )
    max_response_tokens: Positive = 64
    max_prompt_tokens: Positive = Field(default=64, description="longer prompts are refused before the run starts")
    temperature: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="0 takes the most probable token each time (greedy), for evaluate, and where a prompt has one "
        "response",
    )
    max_running_requests: Positive = Field(default=64, description="decoding slots of the embedded server")
    servers: int = Field(
        default=0,
        ge=0,
        description="servers to start on each machine; 0 starts as many SGLang servers as its GPUs are enough for "
        "(each takes --tp-size of them; on a CPU one), or one embedded server per core, at most 4: one on each core "
        "beats one with many threads, since the operations of a small model are too short to share",
    )
    threads: Positive = Field(default=1, description="torch threads of each embedded server")
    ready_deadline_seconds: float = Field(default=120.0, gt=0)
    token_deadline_seconds: float = Field(
        default=1.0,
        gt=0,
        description="time allowed per generated token of a request's longest response before the server counts as lost",
    )
    silence_seconds: float = Field(
        default=60.0,
        gt=0,
        description="a server with work that does not answer /health for so long is taken out, and started again if "
        "it is ours",
    )
    max_restarts: int = Field(
        default=3, ge=0, description="times that each of our servers is started again before the run stops"
    )

    @model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature:g} is too near to 0 to divide by; set 0, which is greedy, or at least "
                f"{_LEAST_TEMPERATURE:g}"
            )
        return self

    def servers_on(self, num_gpus: int) -> int:
        """Count the servers to start on one machine. num_gpus: that it has, 0 on a CPU."""
        if self.servers:
            return self.servers
        return max(1, num_gpus // self.sglang_gpus) if self.engine == "sglang" else min(4, os.cpu_count() or 1)

    @property
    def sglang_tensor_size(self) -> int:
        """Count the GPUs that tensor parallelism divides the weights of one SGLang server over."""
        return self._sglang_size("--tp", "--tp-size", "--tensor-parallel-size")

    @property
    def sglang_gpus(self) -> int:
        """Count the GPUs that one SGLang server takes: by tensor and pipeline parallelism, and for each replica as
        many."""
        shares = "--enable-dp-attention" in self._sglang_words
        replicas = 1 if shares else self._sglang_size("--dp", "--dp-size", "--data-parallel-size")
        pipeline = self._sglang_size("--pp", "--pp-size", "--pipeline-parallel-size")
        return self.sglang_tensor_size * pipeline * replicas

    @property
    def sglang_memory_share(self) -> float | None:
        """Of the memory that is free on a GPU when an SGLang server starts, what it takes for weights and cache; None
        where SGLang decides."""
        try:
            return float(self._sglang_argument("--mem-fraction-static"))
        except ValueError:
            return None

    @property
    def _sglang_words(self) -> list[str]:
        return [part for argument in self.sglang_arguments for part in argument.replace("=", " ").split()]

    def _sglang_size(self, *names: str) -> int:
        size = self._sglang_argument(*names)
        return int(size) if size.isdigit() and int(size) else 1

    def _sglang_argument(self, *names: str) -> str:
        """The last value given under one of these names; empty when there is none."""
        pairs = reversed([*itertools.pairwise(self._sglang_words)])
        return next((value for name, value in pairs if name in names), "")

    @property
    def max_sequence_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


class RolloutSection(GenerationSection):
    prompts_per_step: Positive = Field(
        description="L of the paper: prompts per rollout phase. Under refill it sizes the first phase only; "
        "then the budget decides how many prompts a phase needs"
    )
    samples_per_prompt: Positive = Field(description="K of the paper: the group size")
    router_replay: bool = Field(
        default=False,
        description="train on the experts that the server chose (R3), so that sampler and trainer route alike; needs "
        "the embedded server, or SGLang 0.5.22 on a GPU",
    )
    logprob_tolerance: float = Field(
        default=0.5,
        gt=0,
        description="the run stops when in its first step the 0.999 quantile of |train - rollout log-prob| is above it",
    )
    partial: bool = Field(
        default=False,
        description="C3PO++: the rollout phase ends when the tokens of completed groups reach the budget (for an "
        "algorithm without one: when prompts_per_step groups are complete); unfinished responses are kept and go on "
        "under the next weights. Which ones complete depends on timing, so two runs of one seed differ",
    )
    release_memory: bool = Field(
        default=False,
        description="for servers that this run starts on the GPUs it trains on: they give their memory back while it "
        "trains (SGLang's --enable-memory-saver), and take it again before new weights come",
    )
    max_retention: int = Field(
        default=5,
        ge=0,
        description="with partial: phases over which an unfinished group is kept before it is dropped; 0 drops what a "
        "phase does not finish (over-sampling with early stop)",
    )


def check_servers(rollout: GenerationSection, model: ServingSection) -> None:
    """ValueError for what no server could be started or reached by."""
    num_servers = rollout.servers_on(len(visible_gpus()))
    if rollout.port and rollout.port + num_servers - 1 > 65535:
        raise ValueError(
            f"rollout.port {rollout.port} leaves no room for {num_servers} servers below 65536; set a lower port or 0"
        )
    twice = {url for url in rollout.urls if rollout.urls.count(url) > 1}
    if twice:
        raise ValueError(f"rollout.urls names {sorted(twice)[0]} more than once; each server once")
    if rollout.api_key_variable and not rollout.urls:
        raise ValueError(
            f"rollout.api_key_variable names {rollout.api_key_variable}, but rollout.urls is empty, and servers that a "
            "run starts get a new key from it; leave it out"
        )
    for argument in rollout.sglang_arguments:
        if argument.partition("=")[0] in ("--api-key", "--admin-api-key", "--config"):
            raise ValueError(
                f"rollout.sglang_arguments holds {argument.partition('=')[0]}, by which a run gives its servers their "
                "key; take it out (arguments show in `ps`, and a file can be spelled out as arguments)"
            )
    if rollout.engine == "sglang" and not rollout.urls and not model.trust_remote_code:
        raise ValueError(
            "rollout.engine 'sglang' runs the Python files of the model directory (configuration_bailing_moe.py); "
            "read them and set model.trust_remote_code = true"
        )


class SyncSection(Section):
    """How new weights get to the servers, and how it is proven that they did."""

    transport: Literal["disk", "distributed", "ipc"] = Field(
        default="disk",
        description="disk: through a folder that the servers read, in memory when all is on one machine, else in "
        "run_dir. distributed: broadcast over a process group. ipc: every node hands the weights to the SGLang servers "
        "that the run started on it, which copy them out of the trainer's memory. With several nodes run_dir must be "
        "on a shared file system in any case: servers start with weights from there",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto",
        description="with distributed: of the process group; auto takes nccl where this run trains on GPUs and all "
        "servers are SGLang's on other machines than the first rank's, else gloo. NCCL refuses two members on one GPU, "
        "so it is not for servers that this run starts on its own GPUs",
    )
    bucket_mb: Positive = Field(
        default=512, description="with distributed and ipc: MiB that travel at once, unless one tensor alone is larger"
    )
    probe_every: int = Field(
        default=1,
        ge=0,
        description="steps between proofs that the weights arrived: log-probs of a few tokens through every server "
        "against the trainer's; 0 is never",
    )
    probe_tokens: Annotated[int, Field(ge=2)] = 64
    probe_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="the run stops when the mean difference of the probe's log-probs is above it; default 1e-3 in "
        "float32, 0.1 in bfloat16",
    )


class BudgetSection(Section):
    """The token budget Phi of one optimizer step (Eq. 2)."""

    tokens: Positive = Field(description="Phi: response tokens that carry loss in one optimizer step")
    domains: dict[str, Fraction] = Field(
        default={},
        description="shares of Phi by the domain of the prompt, such as {code = 0.6, science = 0.4}, that sum to 1: so "
        "many tokens of each are in every optimizer step, however long its responses are. Prompts of each domain are "
        "taken as its share needs them, so the weights of data.train only say how files of the same domain mix. Needs "
        "under_full = 'refill'. Default: whatever the prompts in their order bring",
    )
    scope: Literal["global", "per_gpu"] = Field(default="global", description="per_gpu multiplies by training ranks")
    cut: Literal["token", "response"] = Field(
        default="token", description="token: exactly Phi tokens; response: whole responses, overshooting"
    )
    under_full: Literal["refill", "short"] = Field(
        default="refill", description="too few tokens: sample more and carry the surplus, or divide by Phi anyway"
    )
    margin: float = Field(
        default=1.0,
        ge=0,
        description="under refill, standard deviations by which a wave of prompts is larger than is expected to fill "
        "Phi. Less makes more phases wait for a second wave; more leaves more surplus, whose tokens are trained a step "
        "late. On a cluster a second wave takes as long as the longest response: take 2 there",
    )
    max_staleness: int = Field(default=1, ge=0, description="steps a surplus response may wait before it is dropped")
    max_waves: Positive = Field(default=8, description="rollout waves per step before the run stops with an error")

    @model_validator(mode="after")
    def _check_domains(self) -> "BudgetSection":
        total = sum(self.domains.values())
        if self.domains and abs(total - 1) > 1e-9:
            shares = " + ".join(map(str, self.domains.values()))
            raise ValueError(f"the shares of budget.domains must sum to 1, got {shares} = {total:.10g}; change one")
        if self.domains and self.under_full != "refill":
            raise ValueError(
                f"budget.domains needs budget.under_full = 'refill', got {self.under_full!r}: the part of a domain is "
                "filled by sampling more of its prompts; set refill, or take budget.domains out"
            )
        return self


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


class CodeSection(Section):
    """How code rewards run programs; the fields of reward.code.CodeSettings."""

    seconds: float = Field(default=10.0, gt=0, description="of one response, all of its tests")
    cpu_seconds: Positive = Field(default=6, description="of CPU time of the program; on stdin, of each test")
    memory_bytes: int = Field(default=1024**3, ge=64 * 1024**2, description="of all processes of one program")
    processes: int = Field(default=32, ge=8, description="and threads of one program, the sandbox's own included")
    python: str | None = Field(default=None, description="interpreter for programs; none takes /usr/bin/python3")
    cpp_compiler: tuple[str, ...] = Field(
        default=(),
        description='such as ["/usr/bin/g++", "-O2", "-std=c++17"], for blocks marked as C++ with tests on stdin',
    )
    endpoint: str = Field(default="", description="URL of a SandboxFusion server; empty runs programs on this machine")
    allow_without_seccomp: bool = Field(
        default=False, description="judge programs where the sandbox has no seccomp filter, with one layer less"
    )


class EndpointSection(Section):
    """A model behind an OpenAI-compatible endpoint: megatron_rl/endpoint.py."""

    url: str = Field(default="", description="of the server, such as http://host:port/v1")
    model: str = Field(default="", description="the name under which that server has it")
    api_key_variable: str = Field(default="", description="environment variable that holds the key; empty: none")
    timeout_seconds: float = Field(default=60.0, gt=0, description="for one reply, after which it is asked again")
    concurrent: Positive = Field(default=16, description="requests at a time")


class JudgeSection(EndpointSection):
    """A model that is asked about answers that rules call wrong: reward/model_judge.py."""

    domains: tuple[str, ...] = Field(default=(), description="whose wrong answers it is asked about; empty is off")
    max_tokens: Positive = Field(default=1024, description="of its reply")
    max_answer_characters: Positive = Field(default=1000, description="a longer answer is wrong without asking")


class TeacherSection(EndpointSection):
    """A model that answers the prompts in place of a checkpoint: rollout/teacher.py. Temperature, length and number of
    its responses are rollout.temperature, max_response_tokens and samples_per_prompt."""

    url: str = Field(min_length=1, description="of an OpenAI-compatible server, such as http://host:port/v1")
    model: str = Field(min_length=1, description="the name under which that server has it")
    timeout_seconds: float = Field(default=600.0, gt=0, description="for one response, after which it is asked again")
    concurrent: Positive = Field(default=64, description="responses at a time")
    tries: Positive = Field(
        default=5, description="requests for a response before it has failed, and its prompt with it"
    )
    max_failure_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="the run stops when a greater share of prompts failed; --resume asks them again. 1 is off",
    )
    system: str = Field(default="", description="system message before every prompt; empty: none")
    top_p: Fraction = 1.0
    send_seed: bool = Field(
        default=True,
        description="send a seed, another for each response; false for servers that refuse the key `seed`",
    )
    extra: dict[str, Any] = Field(
        default={},
        description='further keys of each request, such as {reasoning_effort = "high"}; max_completion_tokens among '
        "them takes the place of max_tokens",
    )

    @model_validator(mode="after")
    def _check_extra(self) -> "TeacherSection":
        taken = {"model", "messages", "n", "stream", "temperature", "top_p", "max_tokens", "seed"} & self.extra.keys()
        if taken:
            raise ValueError(
                f"teacher.extra names {sorted(taken)[0]!r}, which a request has from elsewhere (rollout.temperature, "
                "rollout.max_response_tokens, rollout.samples_per_prompt, teacher.top_p, seed); take it out"
            )
        return self


# The pool knows "choice" too, which is for evaluation: a guess is right too often to learn from.
RewardKindName = Literal["exact", "math", "stem", "code"]


class RewardSection(Section):
    kind: RewardKindName = Field(
        default="exact", description="code runs programs in a sandbox (docs/sandbox.md); its answers are JSON of tests"
    )
    domains: dict[str, RewardKindName] = Field(
        default={}, description='kinds by the domain of the prompt, such as {code = "code"}; kind is for all others'
    )
    overlong_buffer_tokens: int = Field(
        default=0,
        ge=0,
        description="DAPO's soft punishment: over the last so many tokens before rollout.max_response_tokens a reward "
        "loses up to 1 before advantages are taken; 0 is off",
    )
    workers: Positive = Field(default=2, description="processes for each kind that needs some")
    timeout_seconds: float = Field(
        default=3.0, gt=0, description="for one answer; programs have reward.code.seconds instead"
    )
    max_error_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="a phase of which a greater share of responses could not be judged (timeout, error) stops the run: "
        "they score 0 though nobody knows that they are wrong; 1 is off",
    )
    code: CodeSection = CodeSection()
    judge: JudgeSection = JudgeSection()

    def kind_of(self, domain: str) -> str:
        return self.domains.get(domain, self.kind)

    @model_validator(mode="after")
    def _check_judge(self) -> "RewardSection":
        if self.judge.domains and not (self.judge.url and self.judge.model):
            raise ValueError("reward.judge.domains is set, so reward.judge.url and reward.judge.model must be too")
        programs = [d for d in self.judge.domains if self.kind_of(d) == "code"]
        if programs:
            raise ValueError(
                f"reward.judge.domains names {programs[0]!r}, whose answers are programs; only tests can judge them"
            )
        return self


class RolloutPhase(CommandConfig):
    """What sampling and scoring training prompts takes, whichever model does. It knows nothing of training."""

    run_dir: Path = Field(description="everything that is written lands here")
    seed: int = Field(default=1, ge=0)
    model: ServingSection | None = None
    data: RlData
    rollout: RolloutSection
    reward: RewardSection = RewardSection()

    @property
    def starts_servers(self) -> bool:
        return True

    @property
    def serving(self) -> ServingSection:
        """How servers run the model, where servers are started."""
        assert self.model is not None
        return self.model

    @model_validator(mode="after")
    def _check_sampling(self) -> "RolloutPhase":
        if self.starts_servers:
            if self.model is None:
                raise ValueError("model is required, a checkpoint to sample from; or teacher, an endpoint that answers")
            check_servers(self.rollout, self.model)
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
    """`megatron-rl rollout`: sampled and scored responses to training prompts."""

    model: ServedModelSection | None = None
    teacher: TeacherSection | None = Field(
        default=None, description="an endpoint that answers instead of model, which may then be left out"
    )

    @property
    def starts_servers(self) -> bool:
        return self.teacher is None


class RlConfig(RunConfig, SamplingConfig):
    """`megatron-rl train`, and `rollout` of its rollout phase alone."""

    model: ModelSection
    train: RlTrainSection
    budget: BudgetSection
    algorithm: AlgorithmSection = AlgorithmSection()
    sync: SyncSection = SyncSection()

    @property
    def probe_tolerance(self) -> float:
        return self.sync.probe_tolerance or (1e-3 if self.model.dtype == "float32" else 0.1)

    @model_validator(mode="before")
    @classmethod
    def _refuse_teacher(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("teacher") is not None:
            raise ValueError(
                "teacher is for `megatron-rl rollout` with a configuration without budget, train, optimizer and "
                "algorithm; training needs responses of its own policy, with their log-probs: remove teacher, or make "
                "SFT rows of what the teacher answers (docs/distillation.md)"
            )
        return values

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
        """Whether optimizer steps are filled up to budget.tokens. c3po/algorithms.py has all of each algorithm."""
        return self.algorithm.name == "c3po"

    @model_validator(mode="after")
    def _check_limits(self) -> "RlConfig":
        for problem in impossible(self):
            raise ValueError(problem)
        return self

    def phase_budgets(self, num_training_ranks: int) -> tuple[int, ...]:
        """Phi of every optimizer step of one rollout phase, in tokens."""
        scale = num_training_ranks if self.budget.scope == "per_gpu" else 1
        return (self.budget.tokens * scale,) * self.algorithm.optimizer_steps_per_rollout
