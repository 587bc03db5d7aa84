"""Defines the section `rollout`: generation servers and what is sampled from them."""

import itertools
import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_rl.config.agents import AgentKeys
from megatron_rl.config.section import Positive, Section, Temperature
from megatron_rl.gpus import visible_gpus


class GenerationSection(Section):
    """Describes servers, and what is asked of them: what training and evaluation share."""

    engine: Literal["embedded", "sglang"] = Field(
        default="embedded",
        description='Engine of the generation servers. "embedded": this package\'s own server for CPUs. "sglang": '
        "unmodified SGLang; for a CPU it comes from `make install-sglang`.",
    )
    sglang_python: Path | None = Field(
        default=None,
        description="Python interpreter of an environment with sglang. Default: the running one if it has sglang, "
        "else .venv-sglang in the working directory.",
    )
    sglang_arguments: tuple[str, ...] = Field(
        default=(),
        description='Additional arguments of sglang.launch_server, such as ["--mem-fraction-static", "0.6"].',
    )
    urls: tuple[str, ...] = Field(
        default=(),
        description="URLs of running servers to use, instead of starting servers. SGLang needs a --context-length of "
        "max_prompt_tokens + max_response_tokens + 7.",
    )
    api_key_variable: str = Field(
        default="",
        description='Name of the environment variable that holds the API key of the servers at urls. "": no key. '
        "Servers that the run starts get a new key from the run.",
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of the first server that is started; the next servers have the ports after it. 0: free "
        "ports are picked.",
    )
    max_response_tokens: Positive = Field(
        description="Maximum length of a response, in tokens. Longer responses are cut off, and then have no answer: "
        "choose what the model needs to reach its answers."
    )
    max_prompt_tokens: Positive = Field(
        default=64,
        description="Maximum length of a prompt, in tokens. Longer prompts are refused before the run starts.",
    )
    temperature: Temperature = Field(
        default=1.0,
        description="Sampling temperature. 0: greedy decoding, for `evaluate` and for one response per prompt.",
    )
    max_running_requests: Positive = Field(
        default=64,
        description="Maximum number of requests that one server runs at once. An embedded server has as many decoding "
        "slots.",
    )
    servers: int = Field(
        default=0,
        ge=0,
        description="Number of servers to start on each machine. 0: as many SGLang servers as the GPUs allow (each "
        "takes --tp-size of them; one on a CPU), or one embedded server per core, at most 4. One embedded server per "
        "core is faster than one with many threads, because the operations of a small model are too short to share.",
    )
    threads: Positive = Field(default=1, description="Number of torch threads of each embedded server.")
    ready_deadline_seconds: float = Field(
        default=120.0, gt=0, description="Time limit for a server to answer after its start, in seconds."
    )
    token_deadline_seconds: float = Field(
        default=1.0,
        gt=0,
        description="Time allowed per token of a request's longest possible response, in seconds. After it the server "
        "counts as lost.",
    )
    silence_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Time without a reply to /health after which a server with work is taken out, in seconds. A "
        "server that the run started is then started again.",
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Maximum number of restarts of each server that the run started. Beyond it the run stops. From "
        "the second restart on the pauses grow. After ten minutes of service the count begins again at 0.",
    )

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
        """Return the share of a GPU's free memory that an SGLang server takes at its start for weights and cache; None
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
        """Return the last value given under one of these names; empty when there is none."""
        pairs = reversed([*itertools.pairwise(self._sglang_words)])
        return next((value for name, value in pairs if name in names), "")

    @property
    def max_sequence_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


class RolloutSection(GenerationSection, AgentKeys):
    prompts_per_step: Positive = Field(
        description='Number of prompts per rollout phase: L in the C3PO paper. With budget.under_full = "refill" it '
        "only sizes the first phase; then the budget decides. There it may be left out: then it is as many as fill "
        "the budget with responses of half the maximum length."
    )
    samples_per_prompt: Positive = Field(
        description="Number of responses per prompt, the group size: K in the C3PO paper."
    )
    router_replay: bool = Field(
        default=False,
        description="Trains with the experts that the server chose (R3), so that sampler and trainer route alike. "
        "Needs the embedded server, or SGLang 0.5.22 on a GPU.",
    )
    logprob_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="Maximum difference of trainer and sampler log-probs in the first step, in nats: the 0.999 "
        "quantile of |train - rollout|. Above it the run stops. Default: 0.5 in float32, 2 in bfloat16.",
    )
    partial: bool = Field(
        default=False,
        description="Partial rollouts (C3PO++): a phase ends when completed groups reach the budget, or "
        "prompts_per_step groups for algorithms without a budget. Unfinished responses are kept and continue under "
        "the next weights. Which ones complete depends on timing, so two runs with one seed differ.",
    )
    release_memory: bool = Field(
        default=False,
        description="Servers release their GPU memory while the run trains (SGLang's --enable-memory-saver), and take "
        "it again before new weights come. For servers that this run starts on the GPUs that it trains on.",
    )
    max_retention: int = Field(
        default=5,
        ge=0,
        description="Maximum number of phases over which an unfinished group is kept with partial. Older groups are "
        "dropped. 0: what a phase does not finish is dropped (over-sampling with early stop).",
    )


def check_servers(rollout: GenerationSection) -> None:
    """Raise ValueError for what no server could be started or reached by."""
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
