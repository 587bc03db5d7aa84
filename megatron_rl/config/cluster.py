"""Defines the section `cluster`: the machines that a file is meant for."""

from pathlib import Path

from pydantic import Field, model_validator

from megatron_rl.config.section import Positive, Section


class ClusterSection(Section):
    """Names the machines that a file is meant for: the defaults of `megatron-rl plan`. A start on others says so, no
    more."""

    nodes: Positive = Field(default=1, description="machines, those that serve only among them")
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
