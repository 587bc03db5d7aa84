"""Defines the section `sync`: how weights get to the servers."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_rl.config.section import Positive, Section


class SyncSection(Section):
    """Says how new weights get to the servers, and how it is proven that they did."""

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
    probe_tokens: Annotated[int, Field(ge=2)] = Field(
        default=64, description="of a response, or before the first phase of prompts"
    )
    probe_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="above this mean difference of the probe's log-probs all tensors are compared, and the run stops "
        "unless every one is the trainer's and the difference below ten times this; default 1e-3 in float32, 0.1 in "
        "bfloat16",
    )
