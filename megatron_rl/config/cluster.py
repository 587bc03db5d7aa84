"""Defines the section `cluster`: the machines that a file is meant for."""

from pathlib import Path

from pydantic import Field, model_validator

from megatron_rl.config.section import Positive, Section


class ClusterSection(Section):
    """Names the machines that a file is meant for: the defaults of `megatron-rl plan`. A start on others says so, no
    more."""

    nodes: Positive = Field(default=1, description="Number of machines, including those that only serve.")
    gpus_per_node: Positive = Field(
        default=8, description="Number of GPUs of one machine. A machine that trains has as many training ranks."
    )
    serving_nodes: int = Field(
        default=0,
        ge=0,
        description="Number of these machines that only run generation servers. 0: every machine trains and serves.",
    )
    gpu_memory_gb: float = Field(
        default=80.0,
        ge=0,
        description="Memory of one GPU, in GiB (2^30 bytes). `plan` compares it with the memory that a run needs. 0: "
        "no comparison.",
    )
    rates: Path | None = Field(
        default=None,
        description="File of rates (docs/simulator.md) from which `plan` predicts the time of a step. Not set: no "
        "prediction, and `plan --suggest` uses assumed rates.",
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
