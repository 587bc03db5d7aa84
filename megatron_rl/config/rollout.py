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
        description="what generates: the embedded CPU server, or unmodified SGLang, which on a CPU comes from "
        "`make install-sglang`",
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
    max_response_tokens: Positive = Field(
        description="longer responses are cut off there; what the model needs to reach its answers, since a response "
        "that is cut off has none"
    )
    max_prompt_tokens: Positive = Field(default=64, description="longer prompts are refused before the run starts")
    temperature: Temperature = Field(
        default=1.0,
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
    ready_deadline_seconds: float = Field(
        default=120.0, gt=0, description="how long a server may take from its start until it answers"
    )
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
        default=3,
        ge=0,
        description="times that each of our servers is started again before the run stops, from the second on after "
        "longer and longer pauses; of one that has served for ten minutes since, earlier ends are forgiven",
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
        description="L of the paper: prompts per rollout phase. Under refill it sizes the first phase only; "
        "then the budget decides how many prompts a phase needs. It may be left out there: then it is as many as fill "
        "the budget with responses of half the longest length"
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
