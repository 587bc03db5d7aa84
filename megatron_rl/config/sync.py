"""Defines the section `sync`: how weights get to the servers."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_rl.config.section import Positive, Section


class SyncSection(Section):
    """Says how new weights get to the servers, and how it is proven that they did."""

    transport: Literal["disk", "distributed", "ipc"] = Field(
        default="disk",
        description='How new weights get to the servers. "disk": through a folder that the servers read, in memory '
        'when all is on one machine, else in run_dir. "distributed": broadcast over a process group. "ipc": on each '
        "machine, directly from the trainer's GPU memory to SGLang servers that the run started there. With several "
        "machines run_dir must be on a shared file system in any case, because servers start with weights from there.",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto",
        description='Backend of the process group with transport = "distributed". "auto": nccl where the run trains '
        "on GPUs and all servers are SGLang servers on machines other than the first rank's, else gloo. NCCL does not "
        "allow two members on one GPU, so it is not for servers on the GPUs that the run trains on.",
    )
    bucket_mb: Positive = Field(
        default=512,
        description='Size of one transfer with transport = "distributed" and "ipc", in MiB. A larger tensor goes '
        "alone.",
    )
    probe_every: int = Field(
        default=1,
        ge=0,
        description="Number of steps between checks that the weights arrived. A check compares every server's "
        "log-probs of a few tokens with the trainer's. 0: never.",
    )
    probe_tokens: Annotated[int, Field(ge=2)] = Field(
        default=64,
        description="Number of tokens of one check. They are of a response; before the first phase they are of "
        "prompts.",
    )
    probe_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="Mean log-prob difference, in nats, above which a check compares all tensors. The run stops if a "
        "tensor differs, or if the difference is above ten times this value. Default: 1e-3 in float32, 0.1 in "
        "bfloat16.",
    )
